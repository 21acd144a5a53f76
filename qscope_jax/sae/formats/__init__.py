"""Sparse autoencoders on disk: one module for each format, `registry` to read any of them, `writers` to write most of them."""
