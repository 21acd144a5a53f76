"""Which features a data set misses, and texts that fire them."""
