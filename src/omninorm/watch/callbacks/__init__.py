"""Callbacks: `watch` in other people's training loops. Each module needs its trainer's package and nothing else does:

- `omninorm.watch.callbacks.transformers.WatchCallback` for the Trainer of transformers,
- `omninorm.watch.callbacks.lightning.WatchCallback` for Lightning's,
- `omninorm.watch.callbacks.accelerate.watch` for loops with Accelerate.
"""
