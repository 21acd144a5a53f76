"""The local model as a generator: with its chat template, or with a plain one where it has none; steered by edits, if wanted."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qscope_jax.errors import InputError
from qscope_jax.features.generation.generators import Message, Reply
from qscope_jax.models.edits import Edit
from qscope_jax.models.language_model import Completion, LanguageModel
from qscope_jax.models.sampling import SamplingConfig

BATCH_SIZE = 32


class Template(NamedTuple):
    """How a conversation becomes a prompt where the tokenizer has no chat template.

    Attributes:
        render: The prompt of a conversation.
        stop: Text at which an answer ends; empty for none.
    """

    render: Callable[[Sequence[Message]], str]
    stop: str = ""


def _dialogue(conversation: Sequence[Message]) -> str:
    return "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in conversation) + "Assistant:"


def _continuation(conversation: Sequence[Message]) -> str:
    return conversation[-1]["content"]


DIALOGUE = Template(_dialogue, "\nUser:")
"""Turns under each other, each with its role; for base models that have read dialogues."""

CONTINUATION = Template(_continuation)
"""The last turn alone, as a text to continue; for small base models."""


class LocalGenerator:
    """Answers conversations by a model that is at hand. An answer depends on its conversation and the seed, not on what is asked beside it."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        edits: Sequence[Edit] = (),
        chat: bool | None = None,
        template: Template = DIALOGUE,
        chat_settings: Mapping[str, Any] | None = None,
        batch_size: int = BATCH_SIZE,
        **sampling: Any,
    ):
        """Hold a model.

        Args:
            model: The model.
            edits: Interventions on every answer, such as `steer(sae, feature, strength)`; each with values for one row.
            chat: Use the tokenizer's chat template; by default where there is one.
            template: The prompt where no chat template is used.
            chat_settings: Further settings of the chat template, such as `{"enable_thinking": False}`.
            batch_size: Conversations answered at a time.
            **sampling: Fields of `SamplingConfig`, such as `top_p`, besides those of a call.

        Raises:
            InputError: a batch size below 1, or a chat template is asked for and there is none.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected 1 or more")
        there = bool(getattr(model.tokenizer, "chat_template", None))
        if chat and not there:
            raise InputError(f"{model.name}: its tokenizer has no chat template; generate without chat")
        self.model, self.edits, self.template, self.batch_size = model, tuple(edits), template, batch_size
        self.chat = there if chat is None else chat
        self.chat_settings, self.sampling = dict(chat_settings or {}), dict(sampling)

    @property
    def name(self) -> str:
        """The model, and whether it is edited."""
        return self.model.name + (", edited" if self.edits else "")

    def __call__(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> list[Reply]:
        """A reply to each conversation, in order; of equal ones, each draws by itself.

        Raises:
            InputError: a sampling setting out of range.
        """
        config = SamplingConfig(**{**self.sampling, "max_new_tokens": max_tokens, "temperature": temperature, "seed": seed})
        prompts = [self._prompt(conversation) for conversation in conversations]
        replies = [_refusal(self.model, prompt, max_tokens) for prompt in prompts]
        asked = [index for index, reply in enumerate(replies) if reply is None]
        chosen = [prompts[index] for index in asked]
        answers = continue_prompts(self.model, chosen, config, row_seeds=text_seeds(chosen), edits=self.edits, batch_size=self.batch_size)
        for index, answer in zip(asked, answers, strict=True):
            replies[index] = self._reply(answer)
        return [reply for reply in replies if reply is not None]

    def _prompt(self, conversation: Sequence[Message]) -> str:
        if not conversation:
            return ""
        if not self.chat:
            return self.template.render(conversation)
        turns = [dict(message) for message in conversation]
        return self.model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **self.chat_settings)

    def _reply(self, answer: Completion) -> Reply:
        text = answer.text
        if not self.chat and self.template.stop:
            text = text.split(self.template.stop)[0]
        return Reply(text.strip()) if text.strip() else Reply("", "the answer is empty")


def continue_prompts(
    model: LanguageModel,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    row_seeds: Sequence[int],
    edits: Sequence[Edit] | Callable[[list[int]], Sequence[Edit]] = (),
    batch_size: int = BATCH_SIZE,
    whole_batches: bool = False,
) -> list[Completion]:
    """Continue any number of prompts, in batches of few different shapes, so that little is compiled.

    Args:
        model: The model.
        prompts: Texts of at least one token that fit the model's context.
        config: How to draw.
        row_seeds: What each prompt folds into the seed.
        edits: Interventions with values for one row, or a function that makes those of a batch from the numbers of its prompts; the last
            batch is filled up with repeats.
        batch_size: Prompts continued at a time.
        whole_batches: Whether the last batch is filled up to `batch_size`, and not only to a power of two.

    Raises:
        InputError: as `LanguageModel.generate`.
    """
    # Prompts of like length lie together, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        room = batch_size if whole_batches else min(batch_size, 1 << (len(rows) - 1).bit_length())
        filled = [*rows, *(rows[0] for _ in range(room - len(rows)))]
        made = edits(filled) if callable(edits) else edits
        answers = model.generate([prompts[index] for index in filled], config, edits=made, row_seeds=[row_seeds[index] for index in filled])
        found |= zip(rows, answers[: len(rows)], strict=True)
    return [found[index] for index in range(len(prompts))]


def text_seeds(texts: Sequence[str]) -> list[int]:
    """A seed for each text that depends on it and on how often it came before, not on the others."""
    seen: Counter[str] = Counter()
    seeds = []
    for text in texts:
        seeds.append(stable_seed(text, seen[text]))
        seen[text] += 1
    return seeds


def stable_seed(*parts: str | int) -> int:
    """A number below 2^31 from texts and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


def _refusal(model: LanguageModel, prompt: str, max_tokens: int) -> Reply | None:
    """Why a prompt cannot be continued, so that one that cannot does not fail the others."""
    if not prompt.strip():
        return Reply("", "the conversation is empty")
    length = len(model.tokenize([prompt])[0])
    room = model.config.max_positions - max_tokens
    return None if length <= room else Reply("", f"the conversation has {length} tokens; {room} fit beside {max_tokens} new ones")
