"""Measure one thing each, on the device: blocks, norms, attention, gradients, optimizers, weights."""
