"""Runs two models on the same inputs and finds the module in which they first part."""
