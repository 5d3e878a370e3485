"""The model side of the worker: the only package that imports torch."""
