"""Benchmarks of the whole path: `python -m benchmarks.transport` and `python -m benchmarks.cancellation`."""
