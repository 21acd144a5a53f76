"""Documents for the verbs that run a model over many: those to train on, those kept for evaluation, and their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qscope_jax.cli.sources import ModelOptions
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class TrainingTextOptions(ModelOptions):
    """A model and the documents that it reads."""

    data: str = "tiny"
    """File, folder or hub dataset of texts, or `tiny` for the embedded corpus."""
    column: str = "text"
    """Column or key of the data that holds the text."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most so many documents."""
    holdout_share: float = 0.01
    """Share of the documents, at their end, kept for evaluation; 0 keeps none."""


def split_documents(config: TrainingTextOptions) -> tuple[Sequence[str], Sequence[str]]:
    """Documents to train on, and the share at their end that is kept for evaluation; read when they are asked for.

    Raises:
        QscopeError: the source cannot be read, or `holdout_share` is out of range or leaves nothing.
    """
    from qscope_jax.data.texts import Slice, load_texts

    if not 0 <= config.holdout_share < 1:
        raise ConfigError(f"holdout_share is {config.holdout_share}, expected 0 to below 1")
    if config.data == "tiny":
        from qscope_jax.demo.corpus import documents

        texts: Sequence[str] = documents(4000 if config.limit is None else config.limit, seed=1)
    else:
        texts = load_texts(config.data, column=config.column, split=config.split, limit=config.limit)
    kept = len(texts) - max(round(config.holdout_share * len(texts)), 1 if config.holdout_share else 0)
    if kept < 1:
        raise ConfigError(f"{config.data}: has {len(texts)} documents, of which holdout_share {config.holdout_share} leaves none")
    return Slice(texts, range(kept)), Slice(texts, range(kept, len(texts)))


def tokenize_documents(model: "LanguageModel") -> Callable[[str], list[int]]:
    """Token ids of a document with the model's end token behind them; none for an empty one."""
    end = model.config.eos_token_ids[:1]

    def tokenize(text: str) -> list[int]:
        ids = model.tokenizer(text, verbose=False)["input_ids"]
        return [*ids, *end] if ids else []

    return tokenize
