"""The file of sampled answers: what was finished need not be sampled again, and traces and ablations begin with it."""

import os
from typing import Any, NamedTuple

from qscope_jax.data.record_log import RecordLog
from qscope_jax.errors import InputError, SourceError
from qscope_jax.features.switching.code_switching import Response

_FIELDS = {"model": str, "text": str, "prompt_text": str, "language": str, "task": str, "sample": int, "token_ids": list, "sampling": dict}


class LoggedResponses(NamedTuple):
    """Answers of one model.

    Attributes:
        model: The model.
        prompts: What it read, template and all; `Response.prompt` counts these.
        responses: What it wrote, with its tokens.
        sampling: How that was drawn.
    """

    model: str
    prompts: list[str]
    responses: list[Response]
    sampling: dict[str, Any]


def open_log(path: str | os.PathLike[str]) -> RecordLog:
    """The file, read if it is there, to be given to `sample_responses`.

    Raises:
        SourceError: it cannot be read, or holds something else.
    """
    return RecordLog(path, "response", "answer of a model")


def read_responses(path: str | os.PathLike[str], model: str = "") -> LoggedResponses:
    """The answers of a model; prompts are numbered anew, in the order in which they come.

    Args:
        path: What `sample_responses` wrote.
        model: Its name; may be left out where the file has one model.

    Raises:
        SourceError: there is no such file, it holds no answers, or one of them lacks something.
        InputError: it has no answers of the model, those of several and none is named, or answers drawn in different ways.
    """
    if not os.path.exists(os.path.expanduser(path)):
        raise SourceError(f"{path}: no such file; sample answers first, with qscope code-switch measure --responses")
    records = list(open_log(path))
    for number, record in enumerate(records):
        if wrong := [name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind)]:
            raise SourceError(f"{path}: answer {number} has no readable {wrong[0]!r}; sample the answers again")
    names = sorted({record["model"] for record in records})
    chosen = [record for record in records if model in ("", record["model"])]
    if not chosen or (not model and len(names) > 1):
        raise InputError(f"{path}: has answers of {', '.join(names) or 'no model'}; name one of them")
    if any(record["sampling"] != chosen[0]["sampling"] for record in chosen):
        raise InputError(f"{path}: has answers of {chosen[0]['model']} drawn with different settings; sample each setting to a file of its own")
    places: dict[str, int] = {}
    for record in chosen:
        places.setdefault(record["prompt_text"], len(places))
    responses = [_response(record, places[record["prompt_text"]]) for record in chosen]
    return LoggedResponses(chosen[0]["model"], list(places), responses, chosen[0]["sampling"])


def _response(record: dict[str, Any], prompt: int) -> Response:
    ids = tuple(record["token_ids"])
    return Response(prompt, record["sample"], record["text"], record["language"], record["task"], ids, bool(record.get("stopped", True)))
