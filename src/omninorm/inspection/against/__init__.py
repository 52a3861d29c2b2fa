"""Compares the weights of two checkpoints, tensor by tensor, and explains the differences."""
