"""Unwanted languages: finding their features, holding them down, counting switches."""
