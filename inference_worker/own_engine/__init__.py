"""Engines that users bring: `--engine module:factory`. What one implements is in `protocol`."""
