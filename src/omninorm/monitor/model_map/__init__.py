"""What the model is: its blocks, norms and placements, found without a list of models."""
