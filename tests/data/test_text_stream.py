import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qscope_jax.data import text_stream
from qscope_jax.data.batches import BatchConfig, TokenBatch, TokenBatchIterator, token_batches
from qscope_jax.data.text_stream import TextStream
from qscope_jax.errors import ConfigError, InputError, QscopeError, SourceError

SIZES = (7, 13, 1, 11)
TEXTS = [f"{file} {row}" + " 9" * ((5 * file + row) % 17) for file, size in enumerate(SIZES) for row in range(size)]


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_folder(folder: Path, texts: Iterable[str] = TEXTS, sizes: Iterable[int] = SIZES) -> Path:
    """Files of so many rows each, which hold the texts in order."""
    left = iter(texts)
    for number, size in enumerate(sizes):
        write_lines(folder / f"{number:02}.jsonl", ({"text": text, "id": row} for row, text in enumerate(itertools.islice(left, size))))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one dataset, whose split `train` is the files of a folder, streamed as `datasets` streams files of the hub."""
    folder, load = write_folder(tmp_path / "hub"), datasets.load_dataset

    def load_dataset(path, name=None, *, split, streaming, data_files=None):
        if data_files:
            return load(path, name, split=split, streaming=streaming, data_files=data_files)
        if (path, split) != ("owner/name", "train"):
            raise ValueError(f"Unknown split {split}. Should be one of ['train'].\nSecond line")
        return load("json", data_files=[str(file) for file in sorted(folder.iterdir())], split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return "owner/name"


def words(text: str) -> list[int]:
    return [int(word) + 1 for word in text.split()]


def epochs(stream: TextStream, count: int = 1, *, seed: int = 0, number: int = 0, lanes: int = 1) -> list[str]:
    return list(stream.lane(number, lanes).dataset(seed, count))


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


def same(left: list[TokenBatch], right: list[TokenBatch]) -> bool:
    names = ("tokens_BT", "segment_ids_BT", "positions_BT")
    return len(left) == len(right) and all(np.array_equal(getattr(a, n), getattr(b, n)) for a, b in zip(left, right, strict=True) for n in names)


def one_line(error: pytest.ExceptionInfo[QscopeError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("buffer", [1, 5, 1000])
def test_an_epoch_holds_every_document_once_in_an_order_of_its_own(hub, buffer):
    stream = TextStream(hub, shuffle_buffer=buffer)
    both = epochs(stream, 2)
    first, second = both[: len(TEXTS)], both[len(TEXTS) :]
    assert Counter(first) == Counter(second) == Counter(TEXTS)
    assert first != second and first != TEXTS
    assert first == epochs(TextStream(hub, shuffle_buffer=buffer)) and first != epochs(stream, seed=1)


def test_a_buffer_of_one_keeps_the_order_inside_a_file(hub):
    found = epochs(TextStream(hub, shuffle_buffer=1))
    for file in range(len(SIZES)):
        rows = [text for text in found if text.startswith(f"{file} ")]
        assert rows == [text for text in TEXTS if text.startswith(f"{file} ")]


def test_documents_move_no_further_than_the_buffer(hub):
    order, mixed = epochs(TextStream(hub, shuffle_buffer=1)), epochs(TextStream(hub, shuffle_buffer=8))
    assert order != mixed
    assert [sorted(order[i : i + 8]) for i in range(0, 32, 8)] == [sorted(mixed[i : i + 8]) for i in range(0, 32, 8)]


def test_each_filling_of_the_buffer_and_each_lane_and_epoch_is_mixed_in_its_own_way(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ({"text": str(row)} for row in range(32)))
    alone, (one, other) = (
        epochs(TextStream(path, shuffle_buffer=16), 2),
        (epochs(TextStream(path, shuffle_buffer=16), number=n, lanes=2) for n in range(2)),
    )
    ways = [tuple(int(text) % 16 for text in alone[start : start + 16]) for start in range(0, 64, 16)]
    ways += [tuple(int(text) // 2 % 8 for text in lane[start : start + 8]) for lane in (one, other) for start in (0, 8)]
    assert len(set(ways)) == 8 and all(sorted(way) == list(range(len(way))) for way in ways)


def test_files_are_read_no_further_than_the_buffer_wants(hub, monkeypatch):
    read = []
    monkeypatch.setattr(text_stream, "read_text", lambda value, where, name: read.append(value) or value)
    stream = iter(TextStream(hub, shuffle_buffer=6).lane(0, 1).dataset(0, None))
    for count in (6, 6, 6, 6, 6, 6, 12):
        next(stream)
        assert len(read) == count


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_are_streamed_as_the_hub_is(kind, hub, tmp_path):
    folder = tmp_path / "hub"
    if kind == "parquet":
        folder = tmp_path / "tables"
        folder.mkdir()
        for file in (tmp_path / "hub").iterdir():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{file.stem}.parquet")
    assert epochs(TextStream(folder, shuffle_buffer=5, held_out=9), 2) == epochs(TextStream(hub, shuffle_buffer=5, held_out=9), 2)


def test_one_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    write_lines(tmp_path / "a[1]*.jsonl", [{"text": "mine"}])
    write_lines(tmp_path / "a1.jsonl", [{"text": "other"}])
    assert epochs(TextStream(tmp_path / "a[1]*.jsonl")) == ["mine"]


def test_files_of_a_folder_may_have_other_columns_beside_the_text(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "a", "id": 1}])
    write_lines(tmp_path / "b/b.jsonl", [{"id": "x", "more": {}, "text": "b"}])
    assert sorted(epochs(TextStream(tmp_path))) == ["a", "b"]


def test_offline_the_cache_of_a_hub_dataset_is_streamed(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    assert Counter(epochs(TextStream(hub))) == Counter(TEXTS)
    datasets.enable_progress_bars()


def test_rows_without_text_are_skipped_and_counted(tmp_path):
    rows = [{"text": text} for text in ("a", None, " \n", "b", "", "c")]
    stream = TextStream(write_lines(tmp_path / "rows.jsonl", rows))
    assert sorted(epochs(stream)) == ["a", "b", "c"] and stream.blank == 3
    assert sum(len(epochs(stream, number=lane, lanes=2)) for lane in range(2)) == 3 and stream.blank == 6


def test_held_out_documents_come_first_and_are_never_given(hub):
    stream = TextStream(hub, shuffle_buffer=4, held_out=9)
    assert stream.held_out == TEXTS[:9]
    for lanes in (1, 3):
        given = [text for lane in range(lanes) for text in epochs(stream, 3, number=lane, lanes=lanes)]
        assert Counter(given) == Counter(TEXTS[9:] * 3)


def test_rows_without_text_are_not_held_out(tmp_path):
    rows = [{"text": text} for text in (None, "a", "", "b", None, "c")]
    stream = TextStream(write_lines(tmp_path / "rows.jsonl", rows), held_out=2)
    assert stream.held_out == ["a", "b"] and epochs(stream, 2) == ["c", "c"]


@pytest.mark.parametrize("own_files", [False, True])
def test_lanes_share_the_documents_out(hub, own_files, monkeypatch):
    """By rows where files are few; with as many files as here for each of two lanes, by files."""
    monkeypatch.setattr(text_stream, "_FILES_OF_A_LANE", 2 if own_files else 3)
    stream = TextStream(hub, shuffle_buffer=6)
    lanes = [epochs(stream, number=lane, lanes=2) for lane in range(2)]
    assert Counter(lanes[0] + lanes[1]) == Counter(TEXTS)
    files = [{text[0] for text in lane} for lane in lanes]
    assert files == [{"0", "2"}, {"1", "3"}] if own_files else all(len(found) >= 3 for found in files)
    assert own_files or abs(len(lanes[0]) - len(lanes[1])) <= len(SIZES)


def test_files_of_one_row_are_shared_out_as_well(tmp_path):
    stream = TextStream(write_folder(tmp_path / "many", sizes=[1] * 6))
    assert [len(epochs(stream, number=lane, lanes=3)) for lane in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(("lanes", "own"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("held_out", [0, 9])
def test_a_restored_stream_goes_on_exactly_from_every_document(hub, monkeypatch, lanes, own, held_out):
    monkeypatch.setattr(text_stream, "_FILES_OF_A_LANE", 2 if own else 9)
    for number in range(lanes):
        dataset = TextStream(hub, shuffle_buffer=5 * lanes, held_out=held_out).lane(number, lanes).dataset(3, 2)
        iterator, states, texts = iter(dataset), [], []
        for text in iterator:
            texts.append(text)
            states.append(through_json(iterator.get_state()))
        other = iter(TextStream(hub, shuffle_buffer=5 * lanes, held_out=held_out).lane(number, lanes).dataset(3, 2))
        for place, state in enumerate(states, 1):
            other.set_state(state)
            assert other.get_state() == state
            assert list(other) == texts[place:]


def batches(stream: TextStream, *, lane: int = 0, lanes: int = 1, **settings: Any) -> TokenBatchIterator:
    return token_batches(stream.lane(lane, lanes), words, BatchConfig(**{"batch_size": 3, "length": 8, "seed": 2, "epochs": 3} | settings))


@pytest.mark.parametrize("settings", [{}, {"pack": False}, {"prefetch": 2}])
def test_batches_stopped_anywhere_go_on_as_if_never_stopped(hub, settings):
    iterator = batches(TextStream(hub, shuffle_buffer=6), **settings)
    states, found = [iterator.get_state()], []
    for batch in iterator:
        found.append(batch)
        states.append(through_json(iterator.get_state()))
    assert len(found) > 20 and len(json.dumps(states[9])) < 600
    for place in range(0, len(states), 5):
        restored = batches(TextStream(hub, shuffle_buffer=6), **settings)
        restored.set_state(states[place])
        assert same(list(restored), found[place:]), place


def test_packed_batches_hold_every_token_of_every_epoch(hub):
    tokens = Counter(int(token) for batch in batches(TextStream(hub, shuffle_buffer=6)) for token in batch.tokens_BT[batch.segment_ids_BT > 0])
    assert tokens == Counter({token: 3 * count for token, count in Counter(token for text in TEXTS for token in words(text)).items()})


def test_an_endless_stream_does_not_end(hub):
    iterator = batches(TextStream(hub), epochs=None)
    assert all((next(iterator).segment_ids_BT > 0).any() for _ in range(100))


def test_the_state_of_another_stream_is_refused(hub, tmp_path):
    state = batches(TextStream(hub)).get_state()
    with pytest.raises(InputError, match="files was 4, is 1") as error:
        batches(TextStream(write_lines(tmp_path / "one.jsonl", [{"text": "1"}]))).set_state(state)
    one_line(error)
    for other in (TextStream(hub, held_out=2), TextStream(hub, shuffle_buffer=3)):
        with pytest.raises(InputError, match="the data state belongs to other batches"):
            batches(other).set_state(state)
    with pytest.raises(InputError, match="lane was 0, is 1"):
        batches(TextStream(hub), lane=1, lanes=2).set_state(state)
    state["place"] = {"next_row": 0}
    with pytest.raises(InputError, match="the data state does not fit"):
        batches(TextStream(hub)).set_state(state)


def test_a_source_that_has_shrunk_since_is_said(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(8)])
    iterator = iter(TextStream(path).lane(0, 1).dataset(0, None))
    for _ in range(6):
        next(iterator)
    state = iterator.get_state()
    write_lines(path, [{"text": "1"}])
    other = iter(TextStream(path).lane(0, 1).dataset(0, None))
    other.set_state(state)
    with pytest.raises(SourceError, match="rows.jsonl: no longer holds document 6") as error:
        next(other)
    one_line(error)


def test_a_source_that_is_empty_when_it_comes_round_again_is_said(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "1"}])
    iterator = iter(TextStream(path).lane(0, 1).dataset(0, None))
    next(iterator)
    write_lines(path, [{"text": " "}])
    with pytest.raises(SourceError, match="no longer holds any text"):
        next(iterator)


def test_a_missing_column_is_named_with_those_that_are_there(hub, tmp_path):
    with pytest.raises(InputError, match="owner/name: has no column 'body'; the columns there are 'text', 'id'"):
        TextStream(hub, column="body")
    with pytest.raises(InputError, match="00.jsonl: has no column 'body'; the columns there are 'text', 'id'"):
        TextStream(tmp_path / "hub", column="body", held_out=1)


def test_a_column_of_numbers_is_refused(hub):
    with pytest.raises(InputError, match="owner/name file 0 row 0: column id holds int, expected text"):
        TextStream(hub, column="id", held_out=1)


def test_a_damaged_row_in_the_middle_is_one_line(tmp_path, capfd):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "x" * 2**20}] * 12)
    path.write_bytes(path.read_bytes() + b'{"text": \n{"text": "y"}\n')
    with pytest.raises(SourceError, match=r"rows.jsonl: cannot be read from row \d+ on \(\w+: .+\); mend it, or resume") as error:
        epochs(TextStream(path))
    assert len(one_line(error)) < 400
    assert not capfd.readouterr().err


def test_a_truncated_parquet_file_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no end")
    with pytest.raises(SourceError, match="a.parquet: cannot be read from row 0 on") as error:
        epochs(TextStream(tmp_path))
    one_line(error)


def test_errors_of_the_hub_become_one_line(hub):
    with pytest.raises(SourceError, match="owner/name: no such file or folder, and split test cannot be loaded.*Should be one of") as error:
        TextStream(hub, split="test")
    one_line(error)


def test_a_hub_that_fails_in_the_middle_is_said_with_the_row(hub, monkeypatch):
    loaded = datasets.load_dataset

    def failing(*arguments, **keywords):
        def rows():
            yield from ({"text": str(number)} for number in range(3))
            raise ConnectionError("no route to the hub\nand more")

        return datasets.IterableDataset.from_generator(rows) if keywords.get("streaming") else loaded(*arguments, **keywords)

    monkeypatch.setattr(datasets, "load_dataset", failing)
    stream = iter(TextStream(hub, shuffle_buffer=1).lane(0, 1).dataset(0, None))
    assert [next(stream) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(SourceError, match=r"owner/name: cannot be read from row 3 on \(ConnectionError: no route to the hub\)") as error:
        next(stream)
    one_line(error)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("none.jsonl", "none.jsonl: no such file or folder"),
        ("a b", "not a hub dataset of the form owner/name"),
        ("texts.txt", "is neither a folder nor one of .jsonl, .json, .parquet"),
        ("empty", "has no .jsonl, .json, .parquet files"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a")
    Path("empty").mkdir()
    with pytest.raises(SourceError, match=said):
        TextStream(source)


def test_numbers_out_of_range_are_refused(hub):
    with pytest.raises(ConfigError, match="shuffle_buffer is 0"):
        TextStream(hub, shuffle_buffer=0)
    with pytest.raises(ConfigError, match="held_out -1"):
        TextStream(hub, held_out=-1)
    with pytest.raises(ConfigError, match="has 32 documents with text, fewer than the 33 to hold out"):
        TextStream(hub, held_out=33)
    with pytest.raises(ConfigError, match="lane 2 of 2 does not exist"):
        TextStream(hub).lane(2, 2)


def test_a_stream_with_nothing_to_train_on_is_refused_at_the_beginning(hub, tmp_path):
    with pytest.raises(SourceError, match="owner/name: holds no text beyond the 32 held out for lane 0"):
        batches(TextStream(hub, held_out=32))
    blank = write_lines(tmp_path / "blank.jsonl", [{"text": " "}])
    with pytest.raises(SourceError, match="blank.jsonl: holds no text for lane 0"):
        batches(TextStream(blank))
    with pytest.raises(SourceError, match="holds no text for lane 1"):
        batches(TextStream(write_lines(tmp_path / "one.jsonl", [{"text": "1"}])), lane=1, lanes=2)
    with pytest.raises(InputError, match="none of the first 1,000 documents has any tokens"):
        token_batches(TextStream(hub).lane(0, 1), lambda text: [], BatchConfig(2, 4))


def test_importing_the_module_does_not_import_datasets():
    program = "import sys, qscope_jax.data.text_stream; assert not {'datasets', 'torch', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
