"""Texts with a language each, on their way through a model: which of their tokens count, and batches of one size for each length.

The first token of a text never counts (with Qwen it is an outlier, with others the begin-of-sequence token), and by default neither do tokens
whose norm stands out from their text: a few of them, of a thousandfold norm, would make every mean. The released code of SASFT counts those.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

from qscope_jax.data.batches import TokenBatch, pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.models.language_model import LanguageModel
from qscope_jax.sae.filtering import MAX_NORM_MULTIPLE

Text: TypeAlias = str | Sequence[int] | Int[np.ndarray, " _T"]
"""A text, or the token ids of one, such as a conversation in its template."""
Corpus: TypeAlias = Mapping[str, Sequence[Text]]
"""The texts of each language, by its label."""
Report: TypeAlias = Callable[[int], None] | None
"""Called with the number of tokens of each batch that is done."""

_ROW_MULTIPLE = 8  # rows of a batch, for meshes that share them out; also the fewest


@dataclass(frozen=True)
class CorpusConfig:
    """How texts are read, and how many are enough.

    Raises:
        ConfigError: a value is out of range.
    """

    max_norm_multiple: float = MAX_NORM_MULTIPLE
    """Do not count tokens whose norm exceeds this multiple of the median of their text; 0 counts all but first ones."""
    max_tokens: int = 512
    """Read at most so many tokens of a text, and no more than the model has positions."""
    batch_tokens: int = 8192
    """Tokens of a forward pass, padding included."""
    min_tokens: int = 1000
    """Tokens of each language that must count: of fewer, a mean says little."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("max_norm_multiple", 0), ("max_tokens", 2), ("batch_tokens", 1), ("min_tokens", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {least} or more")


class CorpusBatch(NamedTuple):
    """Rows of tokens, and the language of each by its place in the corpus; the rows that fill a batch up have -1."""

    tokens: TokenBatch
    languages_B: Int[np.ndarray, " B"]


def corpus_batches(model: LanguageModel, corpus: Corpus, config: CorpusConfig) -> Iterator[CorpusBatch]:
    """All texts, shortest first: texts of one bucketed length share batches whatever their language, so there are as many programs as lengths.

    Raises:
        InputError: see `check_corpus`; or a text is empty, or so few tokens of a language are there that too few of them can count.
    """
    check_corpus(corpus)
    rows, languages = [], []
    for place, texts in enumerate(corpus.values()):
        found = [row[: min(config.max_tokens, model.config.max_positions)] for row in _token_ids(model, texts)]
        rows += found
        languages += [place] * len(found)
    check_tokens(list(corpus), np.bincount(languages, weights=[len(row) - 1 for row in rows]).astype(int), config)
    rungs: dict[int, list[int]] = {}
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        rungs.setdefault(bucket_length(len(rows[index])), []).append(index)
    for length, members in rungs.items():
        most = max(config.batch_tokens // length // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
        size = min(most, bucket_length(len(members), minimum=_ROW_MULTIPLE))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            filled = [*(rows[index] for index in chosen), *([] for _ in range(size - len(chosen)))]
            labels = np.full(size, -1)
            labels[: len(chosen)] = [languages[index] for index in chosen]
            yield CorpusBatch(pad_batch(filled, length=length), labels)


def check_corpus(corpus: Corpus, language: str | None = None) -> None:
    """Check that every text has a language and that there are two or more, `language` among them.

    Raises:
        InputError: it is not so.
    """
    if unlabelled := [label for label in corpus if not label.strip()]:
        raise InputError(f"{len(corpus[unlabelled[0]])} texts have no language; label them or leave them out")
    if language is not None and language not in corpus:
        raise InputError(f"no text of language {language!r}; there are {', '.join(corpus) or 'none'}")
    if len(corpus) < 2:
        raise InputError(f"all texts are of language {next(iter(corpus), 'none')}; texts of other languages are needed as well")


def check_tokens(languages: Sequence[str], tokens_K: Int[np.ndarray, " K"], config: CorpusConfig) -> None:
    """Check that enough tokens of every language count.

    Raises:
        InputError: of one they are too few.
    """
    few = [(label, count) for label, count in zip(languages, tokens_K.tolist(), strict=True) if count < config.min_tokens]
    if few:
        label, count = few[0]
        raise InputError(f"language {label} has {count:,} tokens that count, fewer than {config.min_tokens:,}; give more texts or lower min_tokens")


def _token_ids(model: LanguageModel, texts: Sequence[Text]) -> list[list[int]]:
    """Texts as token ids, special tokens in; rows of token ids as they are."""
    if texts and isinstance(texts[0], str):
        return model.tokenize([str(text) for text in texts])
    rows = [[int(token) for token in row] for row in texts]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise InputError(f"row {empty[0]} of token ids is empty; every row needs at least one token")
    return rows
