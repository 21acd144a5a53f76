"""Joins the other processes of a test and prints its number, theirs and how many devices there are: `python -m tests.parallel.joined`."""

import jax

from tests.processes import join

if __name__ == "__main__":
    join()
    print(jax.process_index(), jax.process_count(), jax.device_count())
