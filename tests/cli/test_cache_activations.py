import errno
import json

import pytest

from qscope_jax.training.activation_files import RowsFile, read_cache
from qscope_jax.training.cached_activations import CachedActivations

SMALL = ("--limit", 12, "--layers", "0,2", "--shard-tokens", 200, "--sequence-length", 16, "--model-batch", 4)


def test_a_cache_of_the_layers_asked_for_is_written_and_described(qscope, refused, model, tmp_path):
    answer = qscope("cache-activations", "--model", model, "--out", tmp_path / "cache", *SMALL)
    assert answer.status == 0 and not answer.err and answer.out.startswith("A token takes 80 bytes on disk.\n")
    cache = read_cache(tmp_path / "cache")
    assert (cache.model, cache.layers, cache.d_model, cache.dtype) == (model, (0, 2), 16, "bfloat16")
    assert cache.shards > 1 and 0 < cache.dropped == cache.seen - cache.tokens
    for number in (cache.tokens, cache.dropped, cache.nbytes):
        assert f"{number:,}" in answer.out
    assert "tokens/second" in answer.out and "median norm" in answer.out
    stream = CachedActivations(tmp_path / "cache", batch_tokens=16)
    assert next(stream).shape == (2, 16, 16)
    stream.close()

    assert (
        "exists; pass --overwrite"
        in refused("cache-activations", "--model", model, "--out", tmp_path / "cache", "--max-tokens", 9, *SMALL).split(":", 3)[3]
    )
    assert qscope("cache-activations", "--model", model, "--out", tmp_path / "cache", "--max-tokens", 9, "--overwrite", *SMALL).status == 0
    assert read_cache(tmp_path / "cache").tokens == 9


def test_the_disk_space_is_said_beforehand_where_the_number_of_tokens_is_known(qscope, model, tmp_path):
    options = ("--max-tokens", 1000, "--disk-dtype", "float32")
    answer = qscope("cache-activations", "--model", model, "--out", tmp_path / "cache", *SMALL, *options)
    assert answer.out.splitlines()[0] == "1,000 tokens take 0.00 GB on disk, 144 bytes each."
    assert read_cache(tmp_path / "cache").dtype == "float32"


def test_documents_that_train_sae_holds_out_are_not_cached(qscope, model, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": "tea " * 9}) + "\n" for _ in range(10)))
    seen = []
    for share in (0, 0.5):
        assert (
            qscope("cache-activations", "--model", model, "--data", data, "--out", tmp_path / f"{share}", *SMALL, "--holdout-share", share).status
            == 0
        )
        seen.append(read_cache(tmp_path / f"{share}").seen)
    assert seen[0] == 2 * seen[1]


def test_a_stream_is_cached_to_its_end_without_its_first_documents(qscope, refused, model, tmp_path):
    data = tmp_path / "texts"
    data.mkdir()
    for name in "ab":
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["tea " * 9, " ", *["tea " * 9] * 4]))
    command = ("cache-activations", "--model", model, "--data", data, *SMALL[2:], "--stream")
    seen = {}
    for held_out in (0, 5):
        answer = qscope(*command, "--held-out-documents", held_out, "--out", tmp_path / f"{held_out}")
        assert answer.status == 0 and "2 rows without text were skipped." in answer.out
        seen[held_out] = read_cache(tmp_path / f"{held_out}").seen
    assert seen[0] == 2 * seen[5]
    assert "holds no text beyond the 10 held out" in refused(*command, "--held-out-documents", 10, "--out", tmp_path / "none")
    assert "fewer than the 256 to hold out" in refused(*command, "--out", tmp_path / "none")


def test_a_full_disk_is_one_line_and_the_same_command_resumes(qscope, refused, model, tmp_path, monkeypatch):
    append, calls = RowsFile.append, []

    def full(self, rows_ND):
        calls.append(self)
        if len(calls) == 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows_ND)

    monkeypatch.setattr(RowsFile, "append", full)
    command = ("cache-activations", "--model", model, "--out", tmp_path / "cache", *SMALL)
    assert "the disk is full; " in refused(*command)
    assert "tokens are there already" in qscope(*command).out
    monkeypatch.undo()
    assert qscope("cache-activations", "--model", model, "--out", tmp_path / "whole", *SMALL).status == 0
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.safetensors")} for name in ("cache", "whole"))
    assert one == other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "5"], "layer 5 is out of range"),
        (["--layers", "1,1"], "none of them twice"),
        (["--max-tokens", "0"], "max_tokens is 0, expected 1 or more"),
        (["--shard-tokens", "0"], "shard_tokens is 0, expected 1 or more"),
        (["--sequence-length", "1"], "sequence_length is 1, expected 2 or more"),
        (["--disk-dtype", "int8"], "--disk-dtype is 'int8', expected bfloat16 or float32"),
        (["--data", "none.txt"], "none.txt: no such file"),
        (["--holdout-share", "1"], "holdout_share is 1.0"),
        (["--limit", "1"], "leaves none"),
        (["--stream"], "data is tiny, which is in memory and cannot be streamed"),
        (["--stream", "--data", "owner/name"], "limit is 12, but a stream has no end"),
        (["--stream", "--shuffle-buffer", "0"], "shuffle_buffer is 0, expected 1 or more"),
        (["--stream", "--held-out-documents", "-1"], "held_out_documents is -1, expected 0 or more"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(refused, model, tmp_path, options, said):
    assert said in refused("cache-activations", "--model", model, "--out", tmp_path / "cache", *SMALL, *options)
    assert not list(tmp_path.iterdir())


def test_rows_and_columns_that_cannot_be_read_are_named(refused, model, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "one"}\n{"text": 3}\n{"text": "three"}\n')
    for options, said in ((["--column", "body"], "body"), ([], "texts.jsonl line 2")):
        assert said in refused("cache-activations", "--model", model, "--data", data, "--out", tmp_path / "cache", *SMALL, *options)
    assert list(tmp_path.iterdir()) == [data]


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("cache-activations", "--model", "nowhere/none", "--out", tmp_path / "file" / "cache", *SMALL)
