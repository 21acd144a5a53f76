import json
import re

import numpy as np
import pytest

from qscope_jax.data.record_log import RecordLog
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.generation.generators import Reply
from qscope_jax.features.synthesis import synthesis as module
from qscope_jax.features.synthesis.synthesis import SynthesisConfig, synthesize
from qscope_jax.features.synthesis.synthesis_baselines import coverage_curve, random_synthesis, synthesis_curve
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.features.text_features import text_features

FEATURES = 8
TARGETS = [Target(0, feature, f"about {feature}", harmful=feature == 2 or None) for feature in (1, 2, 5)]


@pytest.fixture
def read(readout_of):
    """Text `x 3=2 5` fires feature 3 at 2 and feature 5 at 1, at a token that counts."""

    def make(texts):
        dense = []
        for text in texts:
            row = np.zeros(FEATURES)
            for feature, value in re.findall(r"(\d)(?:=(\d))?", text):
                row[int(feature)] = float(value or 1)
            dense.append([np.full(FEATURES, 9.0), row])
        return {0: text_features(readout_of(*dense))}

    return make


class Planned:
    """A writer whose texts are planned: (target's key, attempt) -> text; an error is written with an exclamation mark."""

    name = "planned"

    def __init__(self, plan: dict[tuple[str, int], str], otherwise: str = "x"):
        self.plan, self.otherwise = plan, otherwise
        self.asked: list[tuple[str, int]] = []

    def __call__(self, requests, *, seed=0):
        self.asked += [(request.target.key, request.attempt) for request in requests]
        texts = [self.plan.get((request.target.key, request.attempt), self.otherwise) for request in requests]
        return [Reply("", text[1:]) if text.startswith("!") else Reply(text) for text in texts]

    def untargeted(self):
        return Planned({}, "y 5")


class Assistant:
    """Rewrites by adding the style, answers by saying how it was told to; `breaks` makes it fail on texts that contain it."""

    name = "assistant"

    def __init__(self, breaks: str = "none", loses: str = "none"):
        self.breaks, self.loses = breaks, loses
        self.asked = 0
        self.tokens: set[int] = set()

    def __call__(self, conversations, *, max_tokens=256, temperature=0.0, seed=0):
        self.asked += len(conversations)
        self.tokens.add(max_tokens)
        return [self._answer(rule["content"], message["content"]) for rule, message in conversations]

    def _answer(self, rule: str, text: str) -> Reply:
        if self.breaks in text:
            return Reply("", "HTTP 500")
        if "First request" in text:
            return Reply("no" if "x 1" in text else "yes")
        if "reword" in rule:
            return Reply("lost" if self.loses in text else f"{text} again")
        return Reply("refused" if "cannot help" in rule else "helped")


def test_only_texts_that_fire_their_own_target_are_kept(read):
    writer = Planned({("0/1", 0): "x 5", ("0/2", 0): "x 2", ("0/5", 0): "x 3", ("0/1", 1): "x 1=4 2", ("0/5", 1): "x 2"})
    found = synthesize(TARGETS, writer, read, SynthesisConfig(attempts=3))
    assert [(c.key, c.attempt, c.text, c.activation, c.fires) for c in found.kept] == [
        ("0/2", 0, "x 2", 1.0, ("0/2",)),
        ("0/1", 1, "x 1=4 2", 4.0, ("0/1", "0/2")),
    ]
    # What has its text is not asked for again; what has none is, until its attempts are used up.
    assert writer.asked == [("0/1", 0), ("0/2", 0), ("0/5", 0), ("0/1", 1), ("0/5", 1), ("0/5", 2)]
    assert found.written == 6 and found.hit == TARGETS[:2] and found.missed == TARGETS[2:]
    assert found.coverage == pytest.approx(2 / 3)


def test_more_attempts_go_to_targets_that_no_kept_text_fires(read):
    # 0/5 has no text of its own, but one that was written for 0/1 fires it; 0/2 is fired by a text of 0/1 that is thrown away.
    plan = {("0/1", 0): "x 2", ("0/1", 1): "x 1 5", ("0/2", 3): "x 2"}
    writer = Planned(plan)
    found = synthesize(TARGETS, writer, read, SynthesisConfig(attempts=2, attempts_uncovered=9))
    assert [key for key, attempt in writer.asked if attempt < 2] == ["0/1", "0/2", "0/5"] * 2
    assert [request for request in writer.asked if request[1] >= 2] == [("0/2", 2), ("0/2", 3)]
    assert found.missed == TARGETS[2:] and found.coverage == 1


def test_a_run_that_goes_on_knows_what_its_recorded_texts_cover(read, tmp_path):
    plan = {("0/1", 0): "x 1 5", ("0/2", 3): "x 2"}
    config = SynthesisConfig(attempts=1, attempts_uncovered=5, at_once=1)
    alone = synthesize(TARGETS, Planned(plan), read, config)
    log = RecordLog(tmp_path / "log.jsonl", "id", "record")
    synthesize(TARGETS, Planned(plan), read, SynthesisConfig(attempts=1, at_once=1), log=log)
    again = synthesize(TARGETS, Planned(plan), read, config, log=log)
    assert again.candidates == alone.candidates and again.resumed == 3


def test_thresholds_of_the_run_and_of_the_target_count(read):
    targets = [Target(0, 1, threshold=2.0), Target(0, 2)]
    writer = Planned({("0/1", 0): "x 1=2", ("0/1", 1): "x 1=3", ("0/2", 0): "x 2=1", ("0/2", 1): "x 2=2"})
    found = synthesize(targets, writer, read, SynthesisConfig(attempts=2, threshold=1.0))
    assert [(c.key, c.attempt) for c in found.kept] == [("0/1", 1), ("0/2", 1)]


def test_a_budget_is_never_exceeded(read):
    for budget in range(1, 8):
        found = synthesize(TARGETS, Planned({}), read, SynthesisConfig(attempts=5, budget=budget, at_once=2))
        assert found.written == budget
    with_rewrites = SynthesisConfig(attempts=5, budget=5, at_once=2, styles=("fiction",), per_target=2)
    assert synthesize(TARGETS, Planned({}, "x 1 2 5"), read, with_rewrites, assistant=Assistant()).written <= 5


def test_rewrites_are_checked_and_filtered_and_kept_texts_are_answered(read):
    writer = Planned({("0/1", 0): "x 1", ("0/2", 0): "x 2", ("0/5", 0): "x 5"})
    config = SynthesisConfig(styles=("fiction", "roleplay"), same_meaning=True, respond=True, attempts=1, judge_tokens=900)
    judge = Assistant()
    found = synthesize(TARGETS, writer, read, config, assistant=Assistant(loses="x 5"), judge=judge)
    assert judge.tokens == {900}
    rows = [(c.key, c.style, c.text, c.fired, c.kept, c.response) for c in found.candidates]
    assert rows == [
        ("0/1", "vanilla", "x 1", True, True, "helped"),
        ("0/1", "fiction", "x 1 again", True, False, ""),
        ("0/1", "roleplay", "x 1 again", True, False, ""),
        ("0/2", "vanilla", "x 2", True, True, "refused"),
        ("0/2", "fiction", "x 2 again", True, True, "refused"),
        ("0/2", "roleplay", "x 2 again", True, True, "refused"),
        ("0/5", "vanilla", "x 5", True, True, "helped"),
        ("0/5", "fiction", "lost", False, False, ""),
        ("0/5", "roleplay", "lost", False, False, ""),
    ]


def test_thoughts_are_neither_checked_nor_kept(read):
    class Thinks(Assistant):
        def _answer(self, rule: str, text: str) -> Reply:
            return Reply(f"<think>1 2 5</think>\n{super()._answer(rule, text).text}")

    config = SynthesisConfig(styles=("fiction",), respond=True, attempts=1)
    found = synthesize(TARGETS[:1], Planned({("0/1", 0): "x 1"}), read, config, assistant=Thinks())
    assert [(c.text, c.fires, c.response) for c in found.kept] == [("x 1", ("0/1",), "helped"), ("x 1 again", ("0/1",), "helped")]


def test_an_interrupted_run_goes_on_where_it_was_and_ends_the_same(read, tmp_path):
    plan = {("0/1", 2): "x 1", ("0/2", 0): "x 2", ("0/5", 1): "x 5 1"}
    config = SynthesisConfig(attempts=4, at_once=1, styles=("fiction",))
    whole = synthesize(TARGETS, Planned(plan), read, config, assistant=Assistant())

    class Interrupted(Planned):
        def __call__(self, requests, *, seed=0):
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().__call__(requests, seed=seed)

    path = tmp_path / "log.jsonl"
    first = Interrupted(plan)
    with pytest.raises(KeyboardInterrupt):
        synthesize(TARGETS, first, read, config, log=RecordLog(path, "id", "record"), assistant=Assistant())
    path.write_bytes(path.read_bytes()[:-7])  # the last record was being written
    second = Planned(plan)
    again = synthesize(TARGETS, second, read, config, log=RecordLog(path, "id", "record"), assistant=Assistant())
    assert again.candidates == whole.candidates and again.resumed > 0
    assert second.asked[0] == first.asked[3] and not set(first.asked[:3]) & set(second.asked)
    third = Planned(plan)
    assert synthesize(TARGETS, third, read, config, log=RecordLog(path, "id", "record"), assistant=Assistant()).candidates == whole.candidates
    assert third.asked == []


def test_a_request_that_failed_is_reported_and_asked_again_by_the_next_run(read, tmp_path):
    log = RecordLog(tmp_path / "log.jsonl", "id", "record")
    plan = {("0/1", 0): "!HTTP 503", ("0/2", 0): "x 2", ("0/5", 0): "x 5"}
    found = synthesize(TARGETS, Planned(plan), read, SynthesisConfig(attempts=1), log=log)
    assert found.failures == ("0/1 attempt 0: HTTP 503",) and found.written == 2 and len(log) == 2
    healed = synthesize(TARGETS, Planned(plan | {("0/1", 0): "x 1"}), read, SynthesisConfig(attempts=1), log=log)
    assert healed.coverage == 1 and healed.resumed == 2 and healed.failures == ()


def test_an_empty_text_is_written_and_fires_nothing(read, tmp_path):
    log = RecordLog(tmp_path / "log.jsonl", "id", "record")
    for _ in range(2):
        found = synthesize(TARGETS, Planned({("0/2", 0): "x 2"}, " "), read, SynthesisConfig(attempts=2), log=log)
        assert (found.written, [c.key for c in found.kept], found.failures) == (5, ["0/2"], ())
    assert found.resumed == 5 and random_synthesis(TARGETS, Blank({}), read, 4).coverage(4) == 0


class Blank(Planned):
    """Whose control writes nothing."""

    def untargeted(self):
        return Planned({}, "")


def test_a_text_whose_answer_failed_is_made_again(read, tmp_path):
    log = RecordLog(tmp_path / "log.jsonl", "id", "record")
    config = SynthesisConfig(attempts=1, respond=True)
    writer = Planned({}, "x 1 2 5")
    first = synthesize(TARGETS[:2], Planned({("0/1", 0): "x 1", ("0/2", 0): "x 2"}), read, config, log=log, assistant=Assistant(breaks="x 1"))
    assert "0/1 attempt 0 response: HTTP 500" in first.failures and len(log) == 1
    assert [c.key for c in synthesize(TARGETS[:2], writer, read, config, log=log, assistant=Assistant()).kept] == ["0/1", "0/2"]
    assert writer.asked == [("0/1", 0)]


def test_a_run_in_which_everything_fails_stops_at_once(read):
    writer = Planned({}, "!HTTP 401")
    with pytest.raises(SourceError, match="planned: all 3 requests failed, the last with 0/5 attempt 0: HTTP 401"):
        synthesize(TARGETS, writer, read, SynthesisConfig(attempts=9))
    assert len(writer.asked) == 3


def test_the_curve_counts_what_was_thrown_away(read):
    writer = Planned({("0/1", 0): "x 5", ("0/2", 0): "x 2", ("0/5", 0): "x 3", ("0/1", 1): "x 1=4 5", ("0/5", 1): "x 2"})
    found = synthesize(TARGETS, writer, read, SynthesisConfig(attempts=2))
    assert synthesis_curve(found).tolist() == [0, 0, 1, 1, 3, 3] and found.coverage == 1


def test_random_synthesis_writes_as_many_texts_and_keeps_them_all(read, tmp_path):
    log = RecordLog(tmp_path / "log.jsonl", "id", "record")
    found = random_synthesis(TARGETS, Planned({}), read, 7, at_once=3, log=log)
    assert found.texts == ("y 5",) * 7 and len(log) == 7 and found.coverage(7) == found.coverage(99) == pytest.approx(1 / 3)
    assert coverage_curve(found.hits).tolist() == [0, *[1] * 7]
    assert random_synthesis(TARGETS, Planned({}, "!never"), read, 7, log=log).texts == found.texts


def test_a_random_text_that_failed_is_made_up_for(read):
    class Fails(Planned):
        def untargeted(self):
            return Planned({("0/1", 0): "!HTTP 500", ("0/5", 1): "!HTTP 503"}, "y 5")

    found = random_synthesis(TARGETS, Fails({}), read, 7, at_once=3)
    assert len(found.texts) == 7 and found.failures == ("0/1 untargeted 0: HTTP 500", "0/5 untargeted 1: HTTP 503")


def test_a_random_baseline_in_which_everything_fails_stops_at_once(read):
    control = Planned({}, "!HTTP 401")
    control.untargeted = lambda: control
    with pytest.raises(SourceError, match="all 3 requests for the random baseline failed, the last with 0/5 untargeted 0: HTTP 401"):
        random_synthesis(TARGETS, control, read, 900, at_once=3)
    assert len(control.asked) == 3


def test_random_texts_are_read_a_step_at_a_time(read):
    class Varied(Planned):
        def untargeted(self):
            return Planned({("0/1", 0): "x 1", ("0/2", 1): "x 2 5"}, "y")

    sizes = []
    found = random_synthesis(TARGETS, Varied({}), lambda texts: sizes.append(len(texts)) or read(texts), 7, at_once=3)
    assert sizes == [3, 3, 1] and found.hits.toarray().tolist() == [[i == 0, i == 4, i == 4] for i in range(7)]


def test_progress_tells_targets_that_have_their_texts(read):
    told: list[tuple[int, int]] = []
    synthesize(TARGETS, Planned({}, "x 1 2"), read, SynthesisConfig(attempts=2), progress=lambda done, all: told.append((done, all)))
    assert told == [(2, 3), (2, 3)]


def test_what_makes_no_sense_is_refused(read, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"id": "0/1 attempt 0", "candidates": [{"layer": 0}]}) + "\n")
    damaged = RecordLog(tmp_path / "log.jsonl", "id", "record")
    cases = [
        (InputError, "no targets to write for", lambda: synthesize([], Planned({}), read)),
        (InputError, "target 0/1 is given twice", lambda: synthesize([TARGETS[0]] * 2, Planned({}), read)),
        (InputError, "need an assistant", lambda: synthesize(TARGETS, Planned({}), read, SynthesisConfig(respond=True))),
        (InputError, "needs a judge", lambda: synthesize(TARGETS, Planned({}), read, SynthesisConfig(same_meaning=True))),
        (InputError, "style 'rude' is unknown; known are roleplay", lambda: SynthesisConfig(styles=("rude",))),
        (InputError, "attempts_uncovered is 3, expected attempts, which are 16, or more", lambda: SynthesisConfig(attempts_uncovered=3)),
        (InputError, "attempts is 0", lambda: SynthesisConfig(attempts=0)),
        (InputError, "budget is 0", lambda: SynthesisConfig(budget=0)),
        (SourceError, "record 0/1 attempt 0 is damaged", lambda: synthesize(TARGETS, Planned({}), read, log=damaged)),
        (InputError, "random synthesis of 0 texts", lambda: random_synthesis(TARGETS, Planned({}), read, 0)),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line):
            call()
    assert module.VANILLA not in module.STYLES
