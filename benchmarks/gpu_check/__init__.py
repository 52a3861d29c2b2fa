"""The check of omninorm on a GPU, which `benchmarks/gpu.py` runs. Its parts consist of items, each with a result."""
