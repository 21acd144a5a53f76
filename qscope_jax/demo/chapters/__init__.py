"""The tour's chapters, in order: each is a module with a `TITLE` and a function `run(tour)` that returns its results."""

from qscope_jax.demo.chapters import coverage, explain, languages, sentence, steering, switching, tasks, tone, training

CHAPTERS = (training, sentence, languages, steering, tone, tasks, coverage, explain, switching)
