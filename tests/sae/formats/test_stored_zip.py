import io
import struct
import zipfile

import pytest

from qscope_jax.errors import SourceError, UnsafeFileError
from qscope_jax.sae.formats.stored_zip import MAX_ENTRIES, read_directory, verify_checksums

FILES = {"a/one": b"first", "a/two": b"", "a/three": bytes(range(200))}


def archive(files=FILES, method=zipfile.ZIP_STORED, force_zip64=False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, content in files.items():
            with out.open(zipfile.ZipInfo(name), "w", force_zip64=force_zip64) if method == zipfile.ZIP_STORED else out.open(name, "w") as entry:
                entry.write(content)
    return buffer.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    return {name: data[entry.start : entry.start + entry.size] for name, entry in read_directory(memoryview(data), "x.pt").items()}


def patched(data: bytes, position: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, position, value)
    return bytes(changed)


def central(data: bytes, name: bytes) -> int:
    """Position of an entry's record in the central directory: after the data, 46 bytes before its name."""
    return data.rindex(name) - 46


def test_entries_are_found_where_the_standard_library_finds_them():
    assert contents(archive()) == FILES


def test_zip64_fields_are_followed(monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 3)
    data = archive(force_zip64=True)
    assert b"PK\x06\x07" in data
    assert contents(data) == FILES


def test_compressed_entries_are_refused():
    with pytest.raises(UnsafeFileError, match="'a/three' is compressed"):
        contents(archive({"a/three": bytes(1000)}, zipfile.ZIP_DEFLATED))


def test_encrypted_entries_are_refused():
    data = archive()
    with pytest.raises(UnsafeFileError, match="encrypted"):
        contents(patched(data, central(data, b"a/one") + 8, "<H", 1))


def test_a_name_that_occurs_twice_is_refused():
    data = archive({"a/one": b"x", "a/two": b"y"}).replace(b"a/two", b"a/one")
    with pytest.raises(UnsafeFileError, match="'a/one' twice"):
        contents(data)


def test_overlapping_entries_are_refused():
    inner = archive({"b": b"hidden"})
    data = archive({"a": inner, "b": b"hidden"})
    # The second directory record is pointed at a header inside the data of the first.
    with pytest.raises(UnsafeFileError, match="overlaps"):
        contents(patched(data, central(data, b"b") + 42, "<L", data.index(inner)))


def test_a_local_header_that_contradicts_the_directory_is_refused():
    data = archive()
    changed = data.replace(b"a/one", b"a/ONE", 1)
    with pytest.raises(UnsafeFileError, match="contradicts"):
        contents(changed)


@pytest.mark.parametrize("offset, value", [(20, 6), (24, 6), (42, 10**6)])
def test_sizes_and_offsets_outside_the_file_are_refused(offset, value):
    data = archive()
    with pytest.raises(SourceError):
        contents(patched(data, central(data, b"a/one") + offset, "<L", value))


def test_an_entry_that_reaches_into_the_directory_is_refused():
    data = archive({"a": b"x" * 10})
    position = central(data, b"a")
    data = patched(patched(data, position + 20, "<L", 40), position + 24, "<L", 40)
    with pytest.raises(SourceError, match="runs past the end"):
        contents(data)


def test_every_truncation_is_one_clear_error():
    data = archive()
    for length in range(len(data)):
        with pytest.raises(SourceError, match=r"^x\.pt: [^\n]*$"):
            contents(data[:length])


def test_a_directory_with_too_many_entries_is_refused_before_it_is_read():
    data = archive()
    end = len(data) - 22
    with pytest.raises(UnsafeFileError, match=f"at most {MAX_ENTRIES}"):
        contents(patched(patched(data, end + 8, "<H", 10_001), end + 10, "<H", 10_001))


def test_a_directory_with_more_bytes_than_entries_is_refused():
    data = archive()
    with pytest.raises(SourceError, match="longer than its 2 entries"):
        contents(patched(data, len(data) - 12, "<H", 2))


def test_checksums_find_one_flipped_bit():
    data = archive()
    verify_checksums(memoryview(data), read_directory(memoryview(data), "x.pt"), "x.pt")
    start = read_directory(memoryview(data), "x.pt")["a/three"].start
    damaged = patched(data, start + 100, "<B", data[start + 100] ^ 1)
    with pytest.raises(SourceError, match="'a/three' has CRC"):
        verify_checksums(memoryview(damaged), read_directory(memoryview(damaged), "x.pt"), "x.pt")
