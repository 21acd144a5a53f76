"""A corpus' features on disk: one pass writes them, everything after reads them."""
