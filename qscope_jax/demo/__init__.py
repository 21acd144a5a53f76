"""The embedded tiny model, its corpus, and the guided tour."""
