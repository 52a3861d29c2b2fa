"""Exact checks of the training loop: facts that the host knows, or that need no threshold.

They do not synchronize with the device: most are the identity and version of tensors; the others are copied with the
statistics of a sample.
"""
