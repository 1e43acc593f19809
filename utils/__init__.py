"""Signatures, quantization, training and evaluation, and the files they are kept in."""
