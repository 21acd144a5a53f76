"""Joins the other processes of a test and prints what it sees and hears of them: `python -m tests.parallel.joined`."""

import json

import jax

from qscope_jax.parallel.processes import from_all, from_first
from tests.processes import join

if __name__ == "__main__":
    join()
    index = jax.process_index()
    heard = from_first(lambda: {"of": "first"}), from_all({"index": index, "text": "ä" * index})
    print(json.dumps([index, jax.process_count(), jax.device_count(), *heard]))
