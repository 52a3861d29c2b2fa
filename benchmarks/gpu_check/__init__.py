"""The check of omninorm on a GPU, which `benchmarks/gpu.py` runs: parts made of items, each with its own result."""
