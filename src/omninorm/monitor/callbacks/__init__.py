"""Callbacks: `watch` in other people's training loops. Each module needs its trainer's package and nothing else does:

- `omninorm.monitor.callbacks.transformers.WatchCallback` for the Trainer of transformers,
- `omninorm.monitor.callbacks.lightning.WatchCallback` for Lightning's,
- `omninorm.monitor.callbacks.accelerate.watch` for loops with Accelerate.
"""
