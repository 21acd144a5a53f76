"""Where answers switch, token by token, and answers that do not switch at the same place to compare them with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qscope_jax.errors import InputError
from qscope_jax.features.switching.code_switching import Response, first_switched_token, is_switched
from qscope_jax.models.language_model import LanguageModel


@dataclass(frozen=True)
class SwitchPoint:
    """A place in an answer.

    Attributes:
        prompt: Number of the prompt.
        language: Its language.
        prompt_ids: Its tokens.
        answer_ids: Those of the answer, without the one that stopped it.
        place: Place of the token in the answer, from 0: the first that has switched, or where another answer to compare with did.
    """

    prompt: int
    language: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    place: int

    @property
    def before(self) -> list[int]:
        """All that the model has read when it chooses the token at this place."""
        return [*self.prompt_ids, *self.answer_ids[: self.place]]

    @property
    def token(self) -> int:
        """The token at this place."""
        return self.answer_ids[self.place]


def switch_points(model: LanguageModel, prompts: Sequence[str], responses: Sequence[Response], script: str) -> list[SwitchPoint]:
    """The first switched token of every answer that has one.

    Args:
        model: The model, whose tokenizer made the answers' tokens.
        prompts: What it read before each answer, template and all.
        responses: The answers, with their tokens.
        script: Script of the unwanted language.

    Raises:
        InputError: an answer has no tokens or no prompt, or none has switched.
    """
    found = [point for point in _points(model, prompts, responses, script) if point.place >= 0]
    if not found:
        raise InputError(f"none of {len(responses)} answers contains {script}, so there is no switch to look at; sample more of them")
    return found


def matched_points(
    model: LanguageModel,
    points: Sequence[SwitchPoint],
    prompts: Sequence[str],
    responses: Sequence[Response],
    script: str,
    *,
    matches: int = 4,
    seed: int = 0,
) -> list[SwitchPoint]:
    """For every switch, places in answers that have not switched, as far from their beginnings.

    They are drawn at random from answers that are long enough: those to the same prompt first, then those in the same language.

    Args:
        model: The model.
        points: The switches.
        prompts: What the model read.
        responses: The answers; those that have switched are passed over.
        script: Script of the unwanted language.
        matches: Places for each switch, where there are so many.
        seed: Of the draw.

    Raises:
        InputError: no places are asked for, or an answer has no tokens or no prompt.
    """
    if matches < 1:
        raise InputError(f"{matches} answers to compare a switch with; expected 1 or more")
    silent = [point for point in _points(model, prompts, responses, script) if point.place < 0]
    rng = np.random.default_rng(seed)
    found = []
    for point in points:
        fitting = [other for other in silent if other.language == point.language and len(other.answer_ids) > point.place]
        # A stable order of nearness after a random one.
        drawn = sorted((fitting[index] for index in rng.permutation(len(fitting))), key=lambda other: other.prompt != point.prompt)
        found += [replace(one, place=point.place) for one in drawn[:matches]]
    return found


def _points(model: LanguageModel, prompts: Sequence[str], responses: Sequence[Response], script: str) -> list[SwitchPoint]:
    """The first switched token of each answer; place -1 where there is none."""
    for response in responses:
        if not 0 <= response.prompt < len(prompts):
            raise InputError(f"an answer is to prompt {response.prompt}, there are {len(prompts)}; give the prompts that were answered")
        if response.text and not response.token_ids:
            raise InputError(f"answer {response.sample} to prompt {response.prompt} has no tokens; sample answers with sample_responses")
    asked = sorted({response.prompt for response in responses})
    ids = dict(zip(asked, model.tokenize([prompts[prompt] for prompt in asked]) if asked else [], strict=True))
    points = []
    for response in responses:
        answer = response.token_ids[:-1] if response.stopped else response.token_ids
        place = first_switched_token(model.tokenizer, answer, script) if is_switched(response.text, script) else None
        points.append(SwitchPoint(response.prompt, response.language, tuple(ids[response.prompt]), answer, -1 if place is None else place))
    return points
