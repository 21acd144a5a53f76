import collections
import io
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest

from qscope_jax.errors import QscopeError, SourceError, UnsafeFileError
from qscope_jax.sae.formats.torch_pickle import STORAGES, Storage, TensorRecord, emit_pickle, parse_pickle

START = b"\x80\x02"
FLOAT = b"ctorch\nFloatStorage\n"
ORDERED = b"ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts or (text("storage"), FLOAT, text("0"), text("cpu"), b"K\x06")) + b"tQ"


def tensor(rest: bytes = b"K\x00(K\x02K\x03t(K\x03K\x01t\x89" + ORDERED) -> bytes:
    return REBUILD + b"(" + storage() + rest + b"tR"


def flat(name: str, value: bytes) -> bytes:
    return START + b"}" + text(name) + value + b"s."


RECORD = TensorRecord(Storage(np.dtype("<f4"), "0", 6), 0, (2, 3), (3, 1))


def test_a_tensor_becomes_a_record():
    assert parse_pickle(flat("w", tensor()), "x.pt") == {"w": RECORD}


def test_what_is_emitted_is_parsed_back():
    records = {
        f"naïve {index}": TensorRecord(Storage(dtype, str(index), 1 << 40), 1 << 33, (3, 0, 70_000), (1, 2, 300))
        for index, dtype in enumerate(STORAGES.values())
    }
    assert parse_pickle(emit_pickle(records), "x.pt") == records
    pickletools.dis(emit_pickle(records), out=io.StringIO())


def test_a_parameter_is_its_tensor():
    assert parse_pickle(flat("p", b"ctorch._utils\n_rebuild_parameter\n" + tensor() + b"\x88" + ORDERED + b"\x87R"), "x.pt") == {"p": RECORD}


def test_a_state_dict_drops_its_metadata():
    data = START + ORDERED + text("w") + tensor() + b"s}" + text("_metadata") + ORDERED + b"sb."
    assert parse_pickle(data, "x.pt") == {"w": RECORD}


def test_plain_values_are_read_as_they_are():
    value = {"step": 3, "lr": 0.5, "names": ["a", "b"], "big": 1 << 70, "none": None, "flag": True, "pair": (1, 2), "empty": []}
    assert parse_pickle(pickle.dumps(value, protocol=2), "x.pt") == value


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload, named",
    [
        (lambda marker: Call(os.system, f"touch {marker}"), r"(posix|nt)\.system"),
        (lambda marker: Call(eval, f"open({marker!r}, 'w')"), r"builtin\w*\.eval"),
        (lambda marker: Call(exec, f"open({marker!r}, 'w')"), r"builtin\w*\.exec"),
        (lambda marker: Call(open, marker, "w"), r"io\.open"),
        (lambda marker: Call(bytearray, 1 << 40), r"builtin\w*\.bytearray"),
        (lambda marker: collections.Counter("aab"), r"collections\.Counter"),
        (lambda marker: np.ones(2), "numpy"),
    ],
)
def test_a_call_outside_the_list_is_refused_by_name_and_not_made(payload, named, tmp_path):
    marker = tmp_path / "called"
    with pytest.raises(UnsafeFileError, match=named):
        parse_pickle(pickle.dumps({"w": payload(str(marker))}, protocol=2), "x.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    "module, name", [("torch", "load"), ("torch._utils", "_rebuild_tensor_v3"), ("torch", "float32"), ("x\x1b[2J", "y\ttorch FloatStorage")]
)
def test_a_global_one_letter_off_the_list_is_refused_in_one_printable_line(module, name):
    with pytest.raises(UnsafeFileError, match="asks for") as caught:
        parse_pickle(flat("w", f"c{module}\n{name}\n".encode()), "x.pt")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused(protocol):
    with pytest.raises(SourceError):
        parse_pickle(pickle.dumps({"a": (1, "x", [b"bytes"])}, protocol=protocol), "x.pt")


@pytest.mark.parametrize(
    "parts",
    [
        (text("storage"), FLOAT, text("0"), text("cpu")),
        (text("storage"), FLOAT, text("0"), text("cpu"), b"K\x06", b"N"),
        (text("module"), FLOAT, text("0"), text("cpu"), b"K\x06"),
        (text("storage"), text("float"), text("0"), text("cpu"), b"K\x06"),
        (text("storage"), FLOAT, b"K\x00", text("cpu"), b"K\x06"),
        (text("storage"), FLOAT, text("0"), text("cpu"), b"J\xff\xff\xff\xff"),
        (text("storage"), FLOAT, text("0"), text("cpu"), b"\x88"),
        (text("storage"), ORDERED, text("0"), text("cpu"), b"K\x06"),
    ],
)
def test_persistent_ids_of_another_shape_are_refused(parts):
    with pytest.raises(UnsafeFileError, match="not a tensor storage"):
        parse_pickle(flat("w", storage(*parts)), "x.pt")


@pytest.mark.parametrize(
    "rest",
    [
        b"J\xff\xff\xff\xff(K\x02K\x03t(K\x03K\x01t\x89" + ORDERED,
        b"K\x00(J\xfe\xff\xff\xffK\x03t(K\x03K\x01t\x89" + ORDERED,
        b"K\x00(K\x02K\x03t(J\xff\xff\xff\xffK\x01t\x89" + ORDERED,
        b"K\x00(K\x02K\x03t(K\x03t\x89" + ORDERED,
        b"K\x00(K\x02\x88t(K\x03K\x01t\x89" + ORDERED,
        b"K\x00(K\x02K\x03t(K\x03K\x01t\x89}",
        b"K\x00(K\x02K\x03t(K\x03K\x01t\x89",
    ],
    ids=["negative offset", "negative size", "negative stride", "one stride missing", "boolean size", "hooks of another type", "no hooks"],
)
def test_tensors_with_other_arguments_are_refused(rest):
    with pytest.raises(UnsafeFileError):
        parse_pickle(flat("w", tensor(rest)), "x.pt")


def test_a_pending_negation_is_refused_rather_than_dropped():
    rest = b"K\x00(K\x02K\x03t(K\x03K\x01t\x89" + ORDERED + b"}" + text("neg") + b"\x88s"
    with pytest.raises(SourceError, match="resolve_neg"):
        parse_pickle(flat("w", tensor(rest)), "x.pt")


@pytest.mark.parametrize(
    "data",
    [
        START + REBUILD + b"}" + text("__defaults__") + b"Nsb.",
        START + FLOAT + b"}b.",
        START + b"}}b.",
        START + text("x") + b")R.",
        START + FLOAT + b")R.",
    ],
)
def test_state_cannot_be_set_and_nothing_else_can_be_called(data):
    with pytest.raises(UnsafeFileError):
        parse_pickle(data, "x.pt")


@pytest.mark.parametrize("key", [b")" + b"q\x00h\x00\x86" * 20, b")" + b"\x85" * 1000, b"}", b"]", b"G" + bytes(8), FLOAT])
def test_keys_whose_hash_could_hang_or_overflow_the_stack_are_refused(key):
    with pytest.raises(UnsafeFileError, match="dict key"):
        parse_pickle(START + b"}" + key + b"Ns.", "x.pt")


def test_a_huge_memo_index_costs_no_memory():
    assert parse_pickle(START + b"}r\xff\xff\xff\xff.", "x.pt") == {}


@pytest.mark.parametrize(
    "data",
    [b"", START, b"\x80\x03}.", START + b".", START + b"s.", START + b"t.", START + b"(.", START + b"h\x05.", START + b"NNNs.", START + b"}K\x01a."]
    + [START + b"}(K\x01u.", START + b"X\xff\xff\xff\x7fab", START + b"}X\x01\x00\x00\x00\xffNs.", START + b"c\xff\n\n.", START + b"\xfe."],
)
def test_malformed_pickles_are_one_clear_error(data):
    with pytest.raises(SourceError, match=r"^x\.pt: [^\n]*$"):
        parse_pickle(data, "x.pt")


def test_every_truncation_and_every_flipped_byte_is_read_or_refused():
    data = emit_pickle({"w": RECORD, "b": RECORD})
    for position in range(len(data)):
        for changed in (data[:position], *(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :] for bit in range(8))):
            try:
                parse_pickle(changed, "x.pt")
            except QscopeError as error:
                assert str(error).isprintable()
