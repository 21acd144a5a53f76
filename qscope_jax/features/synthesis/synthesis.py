"""Feature-driven synthesis: write texts for features that a data set misses, and keep only those that fire their own (section 6, Eqs. 21-23).

For each target, attempt after attempt: a writer proposes a text; the firing check reads it; a text that fires its target is kept, then rewritten
by attack styles (each rewrite is checked too) and answered, where that is asked for. Nothing but the firing check, and the filter for the same
meaning where it is on, decides what is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from qscope_jax.data.record_log import RecordLog
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.generation.generators import Generator, Reply
from qscope_jax.features.synthesis.coverage import firing_of_texts
from qscope_jax.features.synthesis.feature_reader import FeatureReader
from qscope_jax.features.synthesis.judge import judge_same_meaning
from qscope_jax.features.synthesis.synthesis_prompts import STYLES, response_conversation, rewrite_conversation
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.features.synthesis.writers import Request, Writer

VANILLA = "vanilla"
"""The style of a text that is no rewrite."""


@dataclass(frozen=True)
class SynthesisConfig:
    """What is made. What a run of the same settings has finished is not made again."""

    per_target: int = 1
    """Texts kept for each target, rewrites apart."""
    attempts: int = 16
    """Texts written for a target at most, rewrites apart."""
    attempts_uncovered: int | None = None
    """The same for a target that no kept text fires, be it written for another; None: no more than for any."""
    budget: int | None = None
    """Texts written in all at most, rewrites included; None sets no limit."""
    styles: tuple[str, ...] = ()
    """Attack styles by which every kept text is rewritten."""
    same_meaning: bool = False
    """Keep a rewrite only where a judge says that meaning and risk are the same."""
    respond: bool = False
    """Also answer every kept text: refuse and redirect where its target is harmful, help where it is not."""
    harmful: bool = False
    """Whether targets that do not say so are harmful."""
    threshold: float = 0.0
    """Activation that firing must exceed, besides the target's own threshold."""
    max_tokens: int = 256
    """Tokens of a rewrite or an answer."""
    judge_tokens: int = 64
    """Tokens of the judge's answer; one that thinks aloud needs more."""
    temperature: float = 0.7
    """Of rewrites and answers."""
    at_once: int = 64
    """Texts between two records: what an interruption loses."""
    seed: int = 0
    """Of every draw."""

    def __post_init__(self):
        """Check ranges and styles."""
        for name in ("per_target", "attempts", "max_tokens", "judge_tokens", "at_once"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.attempts_uncovered is not None and self.attempts_uncovered < self.attempts:
            raise InputError(f"attempts_uncovered is {self.attempts_uncovered}, expected attempts, which are {self.attempts}, or more")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"budget is {self.budget}, expected 1 text or more, or none")
        if not self.temperature >= 0 or not self.threshold >= 0:
            raise InputError(f"temperature is {self.temperature} and threshold {self.threshold}; expected 0 or more")
        if unknown := [style for style in self.styles if style not in STYLES]:
            raise InputError(f"style {unknown[0]!r} is unknown; known are {', '.join(STYLES)}")


@dataclass(frozen=True)
class Candidate:
    """A text that was written for a target.

    Attributes:
        layer: Its target's layer.
        feature: Its target's feature.
        attempt: Which attempt at this target, from 0.
        style: `vanilla`, or the attack style of a rewrite.
        text: What was written.
        activation: Largest activation of the target at a token that counts.
        fired: Whether that fires the target, h = 1.
        kept: Whether it fired and, for a rewrite, passed the filter for the same meaning.
        fires: All targets that the text fires, by their key; of kept texts only.
        harmful: Whether the text asks for harm.
        response: The answer, where one was asked for.
    """

    layer: int
    feature: int
    attempt: int
    style: str
    text: str
    activation: float
    fired: bool
    kept: bool
    fires: tuple[str, ...] = ()
    harmful: bool = False
    response: str = ""

    @property
    def key(self) -> str:
        """The target's `layer/feature`."""
        return f"{self.layer}/{self.feature}"


@dataclass(frozen=True)
class Synthesis:
    """What was made for T targets.

    Attributes:
        targets: The targets.
        candidates: All texts that were written, in order.
        failures: Requests that nobody answered, with the reason.
        resumed: Texts that an earlier run had finished.
    """

    targets: tuple[Target, ...]
    candidates: tuple[Candidate, ...]
    failures: tuple[str, ...]
    resumed: int

    @property
    def kept(self) -> list[Candidate]:
        """The data set: texts that fired their own target."""
        return [candidate for candidate in self.candidates if candidate.kept]

    @property
    def written(self) -> int:
        """Texts written: the budget that was used."""
        return len(self.candidates)

    @property
    def hit(self) -> list[Target]:
        """Targets with a kept text of their own."""
        there = {candidate.key for candidate in self.kept}
        return [target for target in self.targets if target.key in there]

    @property
    def missed(self) -> list[Target]:
        """Targets without one."""
        there = {candidate.key for candidate in self.kept}
        return [target for target in self.targets if target.key not in there]

    @property
    def coverage(self) -> float:
        """Cov(D): share of the targets that at least one kept text fires (Eq. 23)."""
        fired = {key for candidate in self.kept for key in candidate.fires}
        return sum(target.key in fired for target in self.targets) / len(self.targets)


def synthesize(
    targets: Sequence[Target],
    writer: Writer,
    read: FeatureReader,
    config: SynthesisConfig | None = None,
    *,
    log: RecordLog | None = None,
    assistant: Generator | None = None,
    judge: Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Synthesis:
    """Write texts until every target has its own, or attempts or budget are used up; on for those that no text fires, where more are allowed.

    Args:
        targets: What to write for, such as the missing ones of a `Coverage`.
        writer: Who proposes texts.
        read: Reads texts with the model and the SAEs, unedited: the firing check.
        config: What to make.
        log: Finished work; what stands there is not made again.
        assistant: Who rewrites and answers; needed where styles or responses are asked for.
        judge: Who says whether a rewrite means the same; needed where that is asked for.
        progress: Called after each step with the targets that have their texts and with their number.

    Raises:
        InputError: no target, one given twice, or nobody to rewrite, to answer or to judge.
        SourceError: a whole step failed, so that going on is of no use; finished work stays in the log.
    """
    config = config or SynthesisConfig()
    _check(targets, config, assistant, judge)
    maker = _Maker(tuple(targets), writer, read, config, log, assistant, judge)
    for attempt in range(config.attempts_uncovered or config.attempts):
        if attempt < config.attempts:
            pending = [target for target in targets if maker.kept.get(target.key, 0) < config.per_target]
        else:
            pending = [target for target in targets if target.key not in maker.covered]
        for start in range(0, len(pending), config.at_once):
            maker.step([Request(target, attempt) for target in pending[start : start + config.at_once]])
            if progress is not None:
                progress(sum(count >= config.per_target for count in maker.kept.values()), len(targets))
    return Synthesis(tuple(targets), tuple(maker.candidates), tuple(maker.failures), maker.resumed)


def _check(targets: Sequence[Target], config: SynthesisConfig, assistant: Generator | None, judge: Generator | None) -> None:
    keys = [target.key for target in targets]
    if not keys:
        raise InputError("no targets to write for; the data covers all of them, or none was given")
    if len(set(keys)) < len(keys):
        raise InputError(f"target {next(key for key in keys if keys.count(key) > 1)} is given twice")
    if (config.styles or config.respond) and assistant is None:
        raise InputError("rewrites by attack styles and responses need an assistant; give a generator that follows instructions")
    if config.same_meaning and judge is None:
        raise InputError("the filter for the same meaning needs a judge; give a generator that follows instructions")


class _Maker:
    """A run under way."""

    def __init__(
        self,
        targets: tuple[Target, ...],
        writer: Writer,
        read: FeatureReader,
        config: SynthesisConfig,
        log: RecordLog | None,
        assistant: Generator | None,
        judge: Generator | None,
    ) -> None:
        self.targets, self.writer, self.read, self.config = targets, writer, read, config
        self.log, self.assistant, self.judge = log, assistant, judge
        self.place = {target.key: place for place, target in enumerate(targets)}
        self.kept: dict[str, int] = {}
        self.covered: set[str] = set()
        self.candidates: list[Candidate] = []
        self.failures: list[str] = []
        self.resumed = 0

    def step(self, requests: list[Request]) -> None:
        """One attempt at some targets: what is finished is taken over, the rest is made and recorded."""
        requests = requests[: self._room()]
        old = {id(request): self._recorded(request) for request in requests}
        fresh = [request for request in requests if old[id(request)] is None]
        made: dict[int, list[Candidate] | None] = {}
        if fresh:
            made = dict(zip(map(id, fresh), self._make(fresh), strict=True))
        for request in requests:
            found = old[id(request)]
            self.resumed += len(found or ())
            if found is None and (found := made[id(request)]) is not None and self.log is not None:
                self.log.add(_identity(request), {"candidates": [asdict(candidate) for candidate in found]})
            for candidate in found or ():
                self.candidates.append(candidate)
                self.covered.update(candidate.fires)
                if candidate.kept and candidate.style == VANILLA:
                    self.kept[candidate.key] = self.kept.get(candidate.key, 0) + 1

    def _room(self) -> int:
        """Requests that the budget still allows; each may take a text and its rewrites."""
        if self.config.budget is None:
            return len(self.targets)
        return max(self.config.budget - len(self.candidates), 0) // (1 + len(self.config.styles))

    def _recorded(self, request: Request) -> list[Candidate] | None:
        record = None if self.log is None else self.log.get(_identity(request))
        if record is None:
            return None
        try:
            return [Candidate(**{**fields, "fires": tuple(fields["fires"])}) for fields in record["candidates"]]
        except (KeyError, TypeError) as error:
            where = self.log.path if self.log is not None else "the log"
            raise SourceError(f"{where}: record {_identity(request)} is damaged ({error}); remove the file to start again") from error

    def _make(self, requests: list[Request]) -> Iterator[list[Candidate] | None]:
        """For each request its text and the rewrites of it; None where somebody failed, so that a later run asks again."""
        replies = self.writer(requests, seed=self.config.seed)
        written = [(request, reply.text) for request, reply in zip(requests, replies, strict=True) if not reply.error]
        self._note([(_identity(request), reply) for request, reply in zip(requests, replies, strict=True)], self.writer.name)
        made = {id(request): [one] for (request, _), one in zip(written, self._checked(written, VANILLA), strict=True)}
        lost: set[int] = set()
        for style in self.config.styles:
            self._rewrite(requests, made, style, lost)
        if self.config.respond:
            self._respond(requests, made, lost)
        return (None if id(request) in lost else made.get(id(request)) for request in requests)

    def _checked(self, written: list[tuple[Request, str]], style: str, same: Sequence[bool] | None = None) -> list[Candidate]:
        """The firing check."""
        table, activations = firing_of_texts(self.targets, [text for _, text in written], self.read, threshold=self.config.threshold)
        hits = csr_array(table)
        found = []
        for row, (request, text) in enumerate(written):
            target = request.target
            fired = np.sort(hits.indices[hits.indptr[row] : hits.indptr[row + 1]])
            own = bool(self.place[target.key] in fired)
            kept = own and (same is None or same[row])
            harmful = self.config.harmful if target.harmful is None else target.harmful
            activation = float(activations[row, self.place[target.key]])
            fires = tuple(self.targets[place].key for place in fired) if kept else ()
            found.append(Candidate(target.layer, target.feature, request.attempt, style, text, activation, own, kept, fires, harmful))
        return found

    def _rewrite(self, requests: list[Request], made: dict[int, list[Candidate]], style: str, lost: set[int]) -> None:
        """Add the rewrites of the kept texts by one style."""
        chosen = [request for request in requests if id(request) in made and made[id(request)][0].kept]
        if not chosen:
            return
        assert self.assistant is not None
        replies = self._ask(self.assistant, [rewrite_conversation(made[id(request)][0].text, style) for request in chosen])
        self._note([(f"{_identity(request)} {style}", reply) for request, reply in zip(chosen, replies, strict=True)], self.assistant.name)
        lost |= {id(request) for request, reply in zip(chosen, replies, strict=True) if reply.error}
        written = [(request, reply.spoken) for request, reply in zip(chosen, replies, strict=True) if not reply.error]
        same = None
        if self.config.same_meaning:
            assert self.judge is not None
            pairs = [(made[id(request)][0].text, text) for request, text in written]
            verdicts = judge_same_meaning(pairs, self.judge, max_tokens=self.config.judge_tokens, seed=self.config.seed)
            for (request, _), verdict in zip(written, verdicts, strict=True):
                if isinstance(verdict, str):
                    self.failures.append(f"{_identity(request)} {style}: the judge's answer {verdict}")
            # A judge that failed has not said that the meaning is the same.
            same = [verdict is True for verdict in verdicts]
        for (request, _), candidate in zip(written, self._checked(written, style, same), strict=True):
            made[id(request)].append(candidate)

    def _respond(self, requests: list[Request], made: dict[int, list[Candidate]], lost: set[int]) -> None:
        """Answer every kept text."""
        places = [(request, i) for request in requests for i, candidate in enumerate(made.get(id(request), ())) if candidate.kept]
        if not places:
            return
        assert self.assistant is not None
        asked = [made[id(request)][i] for request, i in places]
        replies = self._ask(self.assistant, [response_conversation(candidate.text, harmful=candidate.harmful) for candidate in asked])
        self._note([(f"{_identity(request)} response", reply) for (request, _), reply in zip(places, replies, strict=True)], self.assistant.name)
        for (request, i), candidate, reply in zip(places, asked, replies, strict=True):
            made[id(request)][i] = replace(candidate, response=reply.spoken)
            lost |= {id(request)} if reply.error else set()

    def _ask(self, generator: Generator, conversations: Sequence[Any]) -> list[Reply]:
        return generator(conversations, max_tokens=self.config.max_tokens, temperature=self.config.temperature, seed=self.config.seed)

    def _note(self, replies: Sequence[tuple[str, Reply]], name: str) -> None:
        """Note failures; stop where everything failed, which more attempts will not change."""
        failed = [f"{what}: {reply.error}" for what, reply in replies if reply.error]
        self.failures += failed
        if len(failed) == len(replies) > 1:
            raise SourceError(f"{name}: all {len(failed)} requests failed, the last with {failed[-1]}; what is finished is kept, run again to go on")


def _identity(request: Request) -> str:
    return f"{request.target.key} attempt {request.attempt}"
