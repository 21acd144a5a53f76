"""The command line: one small module a verb, which parses, calls the library, prints and writes JSON.

The modules import jax and the rest inside `run`, so that `--help` answers at once.
"""
