"""Compare the weights of two checkpoints, tensor by tensor, and explain what differs."""
