"""Documents for the verbs that run a model over many: those to train on, those kept for evaluation, and their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from qscope_jax.cli.options import check_at_least
from qscope_jax.cli.sources import ModelOptions
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.data.text_stream import TextStream
    from qscope_jax.models.language_model import LanguageModel

    TrainingTexts: TypeAlias = Sequence[str] | TextStream


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
    """Share of the documents, at their end, kept for evaluation; 0 keeps none. Without meaning for a stream: see held_out_documents."""
    stream: bool = False
    """Read a hub dataset, or .jsonl, .json and .parquet files, while training goes on, and never hold or download it as a whole."""
    shuffle_buffer: int = 10_000
    """Documents of a stream that are held in memory and mixed at a time."""
    held_out_documents: int = 256
    """Documents at the beginning of a stream that are kept for evaluation and never trained on; 0 keeps none."""

    @property
    def keeps_some(self) -> bool:
        """Whether documents are kept for evaluation."""
        return bool(self.held_out_documents if self.stream else self.holdout_share)


def split_documents(config: TrainingTextOptions) -> tuple["TrainingTexts", Sequence[str]]:
    """Documents to train on, and those kept for evaluation: the share at their end, or the first ones of a stream.

    All but the latter are read when they are asked for.

    Raises:
        QscopeError: the source cannot be read, an option is out of range or leaves nothing, or a stream is wanted of what cannot be one.
    """
    if config.stream:
        return _stream(config)
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


def say_skipped(texts: "TrainingTexts") -> None:
    """Print how many rows of a stream had no text, if there were any."""
    if blank := getattr(texts, "blank", 0):
        print(f"{blank:,} rows without text were skipped.")


def _stream(config: TrainingTextOptions) -> tuple["TextStream", Sequence[str]]:
    from qscope_jax.data.text_stream import TextStream

    check_at_least(config, 1, "shuffle_buffer")
    check_at_least(config, 0, "held_out_documents")
    if config.data == "tiny":
        raise ConfigError("data is tiny, which is in memory and cannot be streamed; name a hub dataset, a file or a folder, or leave out --stream")
    if config.limit is not None:
        raise ConfigError(f"limit is {config.limit}, but a stream has no end; leave out --limit, or --stream to hold so many documents in memory")
    texts = TextStream(
        config.data, column=config.column, split=config.split, shuffle_buffer=config.shuffle_buffer, held_out=config.held_out_documents
    )
    return texts, texts.held_out


def tokenize_documents(model: "LanguageModel") -> Callable[[str], list[int]]:
    """Token ids of a document with the model's end token behind them; none for an empty one."""
    end = model.config.eos_token_ids[:1]

    def tokenize(text: str) -> list[int]:
        ids = model.tokenizer(text, verbose=False)["input_ids"]
        return [*ids, *end] if ids else []

    return tokenize
