"""How often answers switch to a language that nobody asked for: sampling, detection by script, and ratios with intervals.

As the papers measure it (SASFT, arXiv 2507.14894; Qwen-Scope report, section 7): 8 answers to a prompt, temperature 1, top_p 0.8, up to 2,048
tokens; an answer has switched where it contains a single character of the language's script. Quotations and names count as switches.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from qscope_jax.data.record_log import RecordLog
from qscope_jax.errors import InputError
from qscope_jax.features.generation.local_generator import BATCH_SIZE, continue_prompts, stable_seed, text_seeds
from qscope_jax.features.proportions import SAMPLES as BOOTSTRAP_SAMPLES
from qscope_jax.features.proportions import pooled_difference, pooled_share
from qscope_jax.features.scripts import SCRIPTS, find_script, language_scripts
from qscope_jax.features.switching.switch_prompts import Renderer, SwitchPrompt, prompt_renderer
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.models.sampling import SamplingConfig

SAMPLES = 8
"""Answers to a prompt."""

SAMPLING = SamplingConfig(max_new_tokens=2048, temperature=1.0, top_p=0.8)
"""How the papers draw them."""


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        prompt: Number of its prompt.
        sample: Number among the answers to it.
        text: What was written.
        language: Language of the prompt.
        task: Task of the prompt.
        token_ids: Its tokens, the stop token included.
        stopped: Whether it ended by itself, rather than at the limit.
    """

    prompt: int
    sample: int
    text: str
    language: str
    task: str
    token_ids: tuple[int, ...] = ()
    stopped: bool = True


def target_script(language: str) -> str:
    """The script that tells an unwanted language from others: Han for `zh`, Cyrillic for `ru`, Hangul for `ko`.

    Japanese is told by its kana alone, since its other characters are Chinese, too.

    Raises:
        InputError: the language is not known, or is written in Latin letters, as names and terms in every other language are, too.
    """
    scripts = language_scripts(language)
    if not scripts:
        raise InputError(f"language {language!r} has no known script; name the script that tells it: {', '.join(SCRIPTS[1:])}")
    if "Latin" in scripts:
        raise InputError(f"language {language!r} is written in Latin letters, which tell no language from others; choose one with its own script")
    return "+".join(script for script in scripts if script != "Han" or len(scripts) == 1)


def is_switched(text: str, script: str) -> bool:
    """Whether a text contains a character of a script: a single one is enough.

    Raises:
        InputError: an unknown script.
    """
    return find_script(text, script) >= 0


def first_switched_token(tokenizer: Any, token_ids: Sequence[int], script: str) -> int | None:
    """Place of the token with which the first character of a script begins; None where there is none.

    A character whose bytes are spread over several tokens begins with the first of these.

    Raises:
        InputError: an unknown script.
    """
    ids = list(token_ids)

    def switched(first: int, last: int) -> bool:
        return is_switched(tokenizer.decode(ids[first:last], skip_special_tokens=False), script)

    # Once a text has switched, it has switched however it goes on.
    length = bisect_left(range(len(ids) + 1), True, key=lambda count: switched(0, count))
    if length > len(ids):
        return None
    return next(place for place in range(length - 1, -1, -1) if switched(place, length))


def script_tokens(tokenizer: Any, vocab_size: int, script: str) -> Bool[np.ndarray, " V"]:
    """Which items of a vocabulary contain a character of a script.

    An item that is only a part of a character, as byte-level tokenizers have them, contains none, so that a rare character spelled from
    several such items is not seen.

    Args:
        tokenizer: A Hugging Face tokenizer.
        vocab_size: V of the model, which may exceed the tokenizer's; what that does not know contains nothing.
        script: One of `SCRIPTS`, or several joined by a plus.

    Raises:
        InputError: an unknown script.
    """
    texts = tokenizer.batch_decode([[token] for token in range(vocab_size)])
    return np.array([is_switched(text, script) for text in texts], bool)


def sample_responses(
    model: LanguageModel,
    prompts: Sequence[SwitchPrompt],
    sampling: SamplingConfig = SAMPLING,
    *,
    samples: int = SAMPLES,
    render: Renderer | None = None,
    batch_size: int = BATCH_SIZE,
    log: RecordLog | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Response]:
    """Answer every prompt several times, a batch at a time.

    What is drawn depends on the seed, the prompt and the number of the answer, not on the size of a batch or what else is in it.

    Args:
        model: The model.
        prompts: The prompts.
        sampling: How to draw.
        samples: Answers to each prompt.
        render: What the model reads of a prompt; by default its chat template, where it has one, see `prompt_renderer`.
        batch_size: Answers written at a time.
        log: Finished answers, see `response_log.open_log`; they are taken from there and added to it.
        progress: Called with the number of answers done and of all.

    Raises:
        InputError: no prompts, samples or batch size below 1, or a prompt that does not fit the model beside what it may write.
    """
    if min(samples, batch_size) < 1 or not prompts:
        raise InputError(f"{len(prompts)} prompts, {samples} samples, batches of {batch_size}; expected 1 or more of each")
    render = prompt_renderer(model.tokenizer) if render is None else render
    texts = [render(prompt) for prompt in prompts]
    _check_lengths(model, texts, sampling)
    rows = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    seeds = text_seeds([texts[index] for index, _ in rows])
    keys = [_key(model.name, texts[index], seed, sampling) for (index, _), seed in zip(rows, seeds, strict=True)]
    found: dict[int, Response] = {}

    def add(row: int, text: str, token_ids: tuple[int, ...], stopped: bool) -> None:
        index, sample = rows[row]
        found[row] = Response(index, sample, text, prompts[index].language, prompts[index].task, token_ids, stopped)

    for row, key in enumerate(keys):
        if log is not None and (old := log.get(key)) is not None:
            add(row, old["text"], tuple(old["token_ids"]), old["stopped"])
    waiting = sorted((row for row in range(len(rows)) if row not in found), key=lambda row: len(texts[rows[row][0]]))
    progress(len(found), len(rows))
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        drawn = [texts[rows[row][0]] for row in batch]
        answers = continue_prompts(model, drawn, sampling, row_seeds=[seeds[row] for row in batch], batch_size=batch_size)
        for row, answer in zip(batch, answers, strict=True):
            add(row, answer.text, answer.token_ids, answer.stopped)
            if log is not None:
                log.add(keys[row], {"model": model.name, **asdict(found[row]), "prompt_text": answer.prompt, "sampling": asdict(sampling)})
        progress(len(found), len(rows))
    return [found[row] for row in range(len(rows))]


@dataclass(frozen=True)
class SwitchRatio:
    """A row of the table of ratios.

    Attributes:
        group: `all`, `language` (of the prompt) or `task`.
        name: Which of them; empty for all.
        prompts: Prompts in the row.
        responses: Answers to them.
        switched: Answers that have switched.
        ratio: The share of these.
        low: Lower bound of its interval.
        high: Upper bound.
    """

    group: str
    name: str
    prompts: int
    responses: int
    switched: int
    ratio: float
    low: float
    high: float


def switch_ratios(
    responses: Sequence[Response], script: str, *, level: float = 0.95, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> list[SwitchRatio]:
    """The share of answers that contain a character of a script: of all, by language of the prompt, and by task where there are tasks.

    Answers to one prompt are alike, so intervals are over prompts (a cluster bootstrap), not over answers, which would make them too narrow;
    see `pooled_share` for rows that have a single prompt or answer, or no switch at all.

    Args:
        responses: The answers.
        script: One of `SCRIPTS`, or several joined by a plus.
        level: Share that an interval holds.
        samples: Bootstrap samples.
        seed: Of the samples.

    Raises:
        InputError: no answers, an unknown script, or a level or number of samples out of range.
    """
    if not responses:
        raise InputError("no answers to count switches in; give at least one")
    rows = []
    for group, name, own in _groups(responses):
        prompts, switched_P, answers_P = _by_prompt(own, script)
        share = pooled_share(switched_P, answers_P, level=level, samples=samples, seed=seed)
        rows.append(SwitchRatio(group, name, len(prompts), len(own), int(switched_P.sum()), *share))
    return rows


@dataclass(frozen=True)
class RatioChange:
    """How a ratio differs between two models that answered the same prompts.

    Attributes:
        group: As in `SwitchRatio`.
        name: As in `SwitchRatio`.
        before: Ratio of the first.
        after: Ratio of the second.
        change: Their difference, `after - before`.
        low: Lower bound of its interval; NaN where neither has switched.
        high: Upper bound.
        relative: The change as a share of `before`; NaN where that is 0.
    """

    group: str
    name: str
    before: float
    after: float
    change: float
    low: float
    high: float
    relative: float


def compare_ratios(
    before: Sequence[Response], after: Sequence[Response], script: str, *, level: float = 0.95, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> list[RatioChange]:
    """Differences of the rows of `switch_ratios`, paired: a bootstrap sample has the same prompts of both.

    Raises:
        InputError: the two have not answered the same prompts, or as `switch_ratios`.
    """
    if {(one.prompt, one.language, one.task) for one in before} != {(one.prompt, one.language, one.task) for one in after} or not before:
        raise InputError("the two models answered different prompts, or none; sample both with the same ones")
    rows = []
    for (group, name, first), (_, _, second) in zip(_groups(before), _groups(after), strict=True):
        pair = (_by_prompt(first, script)[1:], _by_prompt(second, script)[1:])
        change = pooled_difference(*pair, level=level, samples=samples, seed=seed)
        old, new = (float(switched.sum() / answers.sum()) for switched, answers in pair)
        rows.append(RatioChange(group, name, old, new, *change, change.value / old if old else float("nan")))
    return rows


def _key(model: str, prompt_text: str, row_seed: int, sampling: SamplingConfig) -> str:
    """What an answer depends on, in short: the key of its record."""
    return f"{stable_seed(model, prompt_text, row_seed, repr(sampling)):08x}{row_seed:08x}"


def _check_lengths(model: LanguageModel, texts: Sequence[str], sampling: SamplingConfig) -> None:
    """Find a prompt that does not fit before hours are spent on those that do."""
    room = model.config.max_positions - sampling.max_new_tokens
    for index, text in enumerate(texts):
        length = len(model.tokenize([text])[0]) if text.strip() else 0
        if not 0 < length <= room:
            found = f"prompt {index} has {length} tokens and {sampling.max_new_tokens} may follow"
            raise InputError(f"{found}; {model.name} has {model.config.max_positions} positions, cut the prompt or lower max_new_tokens")


def _groups(responses: Sequence[Response]) -> list[tuple[str, str, list[Response]]]:
    """The answers in groups: all, each language, and each task where tasks are named."""
    groups = [("all", "", list(responses))]
    for group in ("language", "task"):
        names = sorted({getattr(one, group) for one in responses})
        groups += [(group, name, [one for one in responses if getattr(one, group) == name]) for name in names if name]
    return groups


def _by_prompt(responses: Sequence[Response], script: str) -> tuple[list[int], Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """The prompts, in order, with the answers to each that have switched, and all."""
    prompts = sorted({one.prompt for one in responses})
    place = {prompt: index for index, prompt in enumerate(prompts)}
    of = np.array([place[one.prompt] for one in responses])
    switched = np.array([is_switched(one.text, script) for one in responses])
    return prompts, np.bincount(of[switched], minlength=len(prompts)), np.bincount(of, minlength=len(prompts))
