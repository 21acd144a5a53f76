"""Sparse codes to decisions: read, compare, tell languages apart, steer. Nothing here loads a model."""
