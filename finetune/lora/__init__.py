"""Adapters on a model: layers and their kernels, rows of tokens, PiSSA."""
