"""What synthesis is compared with at equal budget: the same writer without targets, and natural texts from a pool."""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csc_array, csr_array, vstack

from qscope_jax.data.record_log import RecordLog
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.synthesis.coverage import firing, firing_of_texts
from qscope_jax.features.synthesis.feature_reader import FeatureReader
from qscope_jax.features.synthesis.synthesis import Synthesis
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.features.synthesis.writers import Request, Writer
from qscope_jax.features.text_features import TextFeatures

_MOST_ASKED = 2


@dataclass(frozen=True, eq=False)
class Baseline:
    """Texts that were not written for the targets.

    Attributes:
        name: `random synthesis` or `natural sampling`.
        texts: The texts; of natural sampling the whole pool.
        hits: Which of them fire which target, [B, T].
        failures: Requests that nobody answered.
    """

    name: str
    texts: tuple[str, ...]
    hits: csc_array
    failures: tuple[str, ...] = ()

    @property
    def counts(self) -> Int[np.ndarray, " T"]:
        """Texts that fire each target."""
        return np.diff(np.asarray(self.hits.indptr))

    def coverage(self, budget: int) -> float:
        """Share of the targets covered by `budget` of the texts drawn at random, its exact expectation; by all, where they are fewer."""
        return float(expected_coverage(self.counts, len(self.texts), [min(budget, len(self.texts))])[0])


def random_synthesis(
    targets: Sequence[Target],
    writer: Writer,
    read: FeatureReader,
    budget: int,
    *,
    seed: int = 0,
    threshold: float = 0.0,
    at_once: int = 64,
    log: RecordLog | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Baseline:
    """As many texts as a synthesis wrote, by the same writer without targets. All of them are kept, which favours this baseline.

    Args:
        targets: What coverage is measured on.
        writer: The writer of the synthesis; its `untargeted` version writes.
        read: Reads texts with the model and the SAEs.
        budget: Texts to write.
        seed: Of the draws.
        threshold: Activation that firing must exceed, besides a target's own.
        at_once: Texts between two records.
        log: Finished work.
        progress: Called after each step with the texts that are done and with their number.

    Raises:
        InputError: no target, or a budget below 1.
        SourceError: a whole step failed, so that going on is of no use; finished work stays in the log.
    """
    if budget < 1 or not targets:
        raise InputError(f"random synthesis of {budget} texts for {len(targets)} targets; expected at least one of each")
    control = writer.untargeted()
    texts: list[str] = []
    hits: list[csc_array] = []
    failures: list[str] = []
    asked = 0
    # What failed is made up for, since a synthesis' budget counts texts too; but a writer that mostly fails is not asked for ever.
    while len(texts) < budget and asked < _MOST_ASKED * budget:
        # The requests that a synthesis would make, so that the control draws from the same prompts.
        numbers = range(asked, asked + min(at_once, budget - len(texts)))
        step = [Request(targets[i % len(targets)], i // len(targets)) for i in numbers]
        asked += len(step)
        kept = {request: record["text"] for request in step if log is not None and (record := log.get(_identity(request))) is not None}
        fresh = [request for request in step if request not in kept]
        failed = []
        for request, reply in zip(fresh, control(fresh, seed=seed) if fresh else [], strict=True):
            if reply.error:
                failed.append(f"{_identity(request)}: {reply.error}")
                continue
            kept[request] = reply.text
            if log is not None:
                log.add(_identity(request), {"text": reply.text})
        failures += failed
        if len(failed) == len(fresh) > 1:
            raise SourceError(
                f"{control.name}: all {len(failed)} requests for the random baseline failed, the last with {failed[-1]}; what is finished is kept, "
                "run again to go on"
            )
        found = [str(kept[request]) for request in step if request in kept]
        # Read step by step, so that memory holds the codes of one step and not of the whole budget.
        hits.append(firing_of_texts(targets, found, read, threshold=threshold)[0])
        texts += found
        if progress is not None:
            progress(len(texts), budget)
    if not texts:
        raise SourceError(f"{control.name}: wrote no text for the random baseline; the last error: {failures[-1]}")
    return Baseline("random synthesis", tuple(texts), csc_array(vstack(hits, format="csc")), tuple(failures))


def natural_sampling(targets: Sequence[Target], texts: Sequence[str], features: Mapping[int, TextFeatures], *, threshold: float = 0.0) -> Baseline:
    """Texts that people wrote, drawn at random from a pool, such as the data that the seed set was taken from.

    Args:
        targets: What coverage is measured on.
        texts: The pool.
        features: Tables of the pool's texts, by layer.
        threshold: Activation that firing must exceed, besides a target's own.

    Raises:
        InputError: an empty pool, or tables of other texts.
    """
    hits = firing(targets, features, threshold=threshold)
    rows = typing.cast(tuple[int, int], hits.shape)[0]
    if not texts or rows != len(texts):
        raise InputError(f"a pool of {len(texts)} texts with tables of {rows}; expected tables of these texts, at least one")
    return Baseline("natural sampling", tuple(texts), hits)


class BudgetRow(NamedTuple):
    """One way to make a data set, at one budget."""

    method: str
    written: int
    """Texts written (or drawn)."""
    kept: int
    """Texts in the data set."""
    coverage: float
    """Cov(D)."""


def compare_at_budget(result: Synthesis, baselines: Sequence[Baseline]) -> list[BudgetRow]:
    """Cov(D) of the synthesis beside baselines at its two budgets: as many texts as it wrote, and as many as it kept.

    The first favours the baselines, which keep everything; the second is the size of the data set, as in the paper.
    """
    kept = len(result.kept)
    rows = [BudgetRow("feature-driven synthesis", result.written, kept, result.coverage)]
    for baseline in baselines:
        sizes = dict.fromkeys(min(budget, len(baseline.texts)) for budget in (result.written, kept))
        rows += [BudgetRow(baseline.name, size, size, baseline.coverage(size)) for size in sizes]
    return rows


def synthesis_curve(result: Synthesis) -> Int[np.ndarray, " B1"]:
    """Targets covered by the kept texts among the first n that were written, for n = 0 to all of them: the cost of what was thrown away shows."""
    place = {target.key: i for i, target in enumerate(result.targets)}
    rows = [[place[key] for key in candidate.fires if candidate.kept] for candidate in result.candidates]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    indices = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row, np.int64) for row in rows)])
    return coverage_curve(csr_array((np.ones(len(indices), bool), indices, indptr), shape=(len(rows), len(place))))


def coverage_curve(hits: csr_array | csc_array) -> Int[np.ndarray, " B1"]:
    """Targets covered by the first n of B texts in their order, for n = 0 to B; `hits` is [B, T]."""
    table = csc_array(hits)
    table.sort_indices()
    begins, ends = table.indptr[:-1], table.indptr[1:]
    first = table.indices[begins[ends > begins]]
    texts = typing.cast(tuple[int, int], table.shape)[0]
    return np.concatenate([[0], np.cumsum(np.bincount(first, minlength=texts))]).astype(np.int64)


def expected_coverage(counts: Int[np.ndarray, " T"], texts: int, budgets: Sequence[int]) -> Float[np.ndarray, " Q"]:
    """Expected share of T targets covered by n of B texts drawn without replacement, in closed form.

    A target that c texts fire is missed with probability C(B - c, n) / C(B, n).

    Args:
        counts: Texts that fire each target.
        texts: B.
        budgets: Values of n.

    Raises:
        InputError: a budget above B or below 0, or no target.
    """
    from scipy.special import gammaln

    counts, drawn = np.asarray(counts, np.float64), np.asarray(budgets, np.float64)[:, None]
    if not counts.size or drawn.size and not 0 <= drawn.min() <= drawn.max() <= texts:
        raise InputError(f"budgets of {list(budgets)} texts from {texts} for {counts.size} targets; expected 0 to {texts}, and at least one target")
    left = texts - counts
    with np.errstate(invalid="ignore"):
        log_missed = gammaln(left + 1) - gammaln(left - drawn + 1) - gammaln(texts + 1) + gammaln(texts - drawn + 1)
    missed = np.where(drawn > left, 0.0, np.exp(np.where(drawn > left, 0.0, log_missed)))
    return (1 - missed).mean(axis=1)


def _identity(request: Request) -> str:
    return f"{request.target.key} untargeted {request.attempt}"
