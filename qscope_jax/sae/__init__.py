"""Residual stream to sparse code and back: the autoencoder, exact top-k, file formats, metrics."""
