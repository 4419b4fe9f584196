"""Weights of the PyTorch originals, in and out."""
