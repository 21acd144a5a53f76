"""Texts with the class of each, from a JSON-lines, Parquet or CSV file or from the hub."""

from dataclasses import dataclass
from pathlib import Path

from qscope_jax.data.tables import load_table
from qscope_jax.errors import SourceError


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their classes, which are names: whole numbers and booleans are written out.

    Attributes:
        texts: The texts, none of them blank.
        labels: The class of each.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]


def load_labelled_texts(
    source: str | Path, *, column: str = "text", label_column: str = "label", split: str = "train", limit: int | None = None
) -> LabelledTexts:
    """Read texts with their classes; rows whose text is blank are left out.

    Args:
        source: What `load_table` reads.
        column: Key or column that holds the text.
        label_column: Key or column that holds the class: text, a whole number or a boolean.
        split: Split of a hub dataset.
        limit: Read at most this many rows.

    Raises:
        SourceError: there is no such source, or it is empty, damaged, or of another kind.
        InputError: there is no such column, it holds something else, or a row has no class.
    """
    table = load_table(source, split=split, limit=limit)
    table = table.select([index for index, text in enumerate(table.texts(column)) if text.strip()])
    if not len(table):
        raise SourceError(f"{source}: holds no text in column {column}, all rows are blank; check the source and the column")
    return LabelledTexts(tuple(table.texts(column)), tuple(table.classes(label_column)))
