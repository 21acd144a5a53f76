"""Endless repetition: seeing it in token ids, finding the features that rise with it, steering into it."""
