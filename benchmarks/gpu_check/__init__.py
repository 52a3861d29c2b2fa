"""The check of omninorm on a GPU that `benchmarks/gpu.py` runs: parts, each made of items with results of their own."""
