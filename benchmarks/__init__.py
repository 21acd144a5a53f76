"""One script for each claim about speed or memory; each measures both sides in one run and prints one table."""
