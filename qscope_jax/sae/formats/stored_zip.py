"""The directory of a ZIP archive whose entries are all stored uncompressed, read strictly from memory-mapped bytes.

PyTorch's `.pt` files are such archives. Everything is checked before it is believed: a hostile or truncated archive gives one clear error,
and a good one gives byte ranges inside the file, so that nothing has to be copied. Only the directory and the local headers are read.
"""

import struct
import zlib
from dataclasses import dataclass

from qscope_jax.errors import SourceError, UnsafeFileError

MAX_ENTRIES = 10_000
"""Archives with more entries are refused before their directory is read."""

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x2041
_CRC_BLOCK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One stored file inside an archive.

    Attributes:
        name: Its name inside the archive.
        header: Byte offset of its local header in the archive.
        start: Byte offset of its first data byte.
        size: Number of data bytes.
        crc32: Checksum that the directory records for them.
    """

    name: str
    header: int
    start: int
    size: int
    crc32: int


def read_directory(data: memoryview, where: str) -> dict[str, Entry]:
    """Byte range of every entry of the archive `data`, by name, in directory order.

    Args:
        data: The whole file, as bytes.
        where: What to call the file in errors.

    Raises:
        UnsafeFileError: entries are compressed, encrypted, repeated or overlapping, or there are more than `MAX_ENTRIES`.
        SourceError: the archive is truncated or malformed.
    """
    count, position, end = _directory_range(data, where)
    if count > MAX_ENTRIES:
        raise UnsafeFileError(f"{where}: the archive lists {count} entries, at most {MAX_ENTRIES} are accepted; this is not a checkpoint of tensors")
    limit = position
    entries: dict[str, Entry] = {}
    for _ in range(count):
        entry, position = _central_entry(data, position, end, limit, where)
        if entry.name in entries:
            raise UnsafeFileError(f"{where}: the archive holds {entry.name!r} twice; refusing to choose one, re-save the file")
        entries[entry.name] = entry
    if position != end:
        raise SourceError(f"{where}: the archive directory is longer than its {count} entries; the file is damaged, download it again")
    _refuse_overlap(entries, where)
    return entries


def verify_checksums(data: memoryview, entries: dict[str, Entry], where: str) -> None:
    """Read every entry once and compare its CRC-32 with the directory's.

    Raises:
        SourceError: a checksum differs.
    """
    for entry in entries.values():
        crc, stop = 0, entry.start + entry.size
        for start in range(entry.start, stop, _CRC_BLOCK):
            crc = zlib.crc32(data[start : min(start + _CRC_BLOCK, stop)], crc)
        if crc != entry.crc32:
            raise SourceError(f"{where}: entry {entry.name!r} has CRC {crc:08x}, its directory says {entry.crc32:08x}; download the file again")


def _directory_range(data: memoryview, where: str) -> tuple[int, int, int]:
    """Number of entries, first byte and end of the central directory; zip64 records are followed where present."""
    end_record = len(data) - _END.size
    if end_record < 0 or data[end_record : end_record + 4] != b"PK\x05\x06":
        raise SourceError(f"{where}: has no end-of-archive record; the file is truncated or not written by torch.save, download it again")
    _, _, _, _, count, size, start, comment = _END.unpack_from(data, end_record)
    limit = end_record
    locator = end_record - _END64_LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, _, limit, _ = _END64_LOCATOR.unpack_from(data, locator)
        if limit + _END64.size > locator or data[limit : limit + 4] != b"PK\x06\x06":
            raise SourceError(f"{where}: its zip64 record is not where the archive says; the file is damaged, download it again")
        *_, count, size, start = _END64.unpack_from(data, limit)
    if comment or start + size > limit:
        raise SourceError(f"{where}: the archive directory lies outside the file; the file is truncated or damaged, download it again")
    return count, start, start + size


def _central_entry(data: memoryview, position: int, end: int, limit: int, where: str) -> tuple[Entry, int]:
    """The entry at `position` of the central directory and the position after it; entries must end before `limit`."""
    if position + _CENTRAL.size > end or data[position : position + 4] != b"PK\x01\x02":
        raise SourceError(f"{where}: the archive directory is damaged at byte {position}; download the file again")
    fields = _CENTRAL.unpack_from(data, position)
    flags, method, crc, compressed, size = fields[3], fields[4], *fields[7:10]
    name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
    name_end = position + _CENTRAL.size + name_length
    after = name_end + extra_length + comment_length
    if after > end:
        raise SourceError(f"{where}: the archive directory is damaged at byte {position}; download the file again")
    raw_name = bytes(data[position + _CENTRAL.size : name_end])
    name = raw_name.decode("utf-8", "backslashreplace")
    size, compressed, header = _widen(data[name_end : name_end + extra_length], size, compressed, header)
    if flags & _ENCRYPTED:
        raise UnsafeFileError(f"{where}: entry {name!r} is encrypted; save the file without encryption")
    if method != 0 or compressed != size:
        raise UnsafeFileError(f"{where}: entry {name!r} is compressed (method {method}); torch.save stores entries plain, re-save the file with it")
    start = _data_start(data, header, raw_name, where)
    if start + size > limit:
        raise SourceError(f"{where}: entry {name!r} runs past the end of the data; the file is truncated or damaged, download it again")
    return Entry(name, header, start, size, crc), after


def _widen(extra: memoryview, size: int, compressed: int, header: int) -> tuple[int, int, int]:
    """Replace each 32-bit field that reads all ones by its 64-bit value from the zip64 extra field, in the order the format fixes."""
    while len(extra) >= 4:
        identifier, length = struct.unpack_from("<HH", extra)
        if identifier == 1:
            body = extra[4 : 4 + length]
            wide = list(struct.unpack_from(f"<{len(body) // 8}Q", body))
            values = [wide.pop(0) if value == 0xFFFFFFFF and wide else value for value in (size, compressed, header)]
            return values[0], values[1], values[2]
        extra = extra[4 + length :]
    return size, compressed, header


def _data_start(data: memoryview, header: int, raw_name: bytes, where: str) -> int:
    """Where an entry's data begin: only the local header knows, since its padding is not in the directory."""
    if header + _LOCAL.size > len(data) or data[header : header + 4] != b"PK\x03\x04":
        raise SourceError(f"{where}: entry {raw_name!r} has no header at byte {header}; the file is truncated or damaged, download it again")
    fields = _LOCAL.unpack_from(data, header)
    flags, method, name_length, extra_length = fields[2], fields[3], *fields[9:11]
    name_start = header + _LOCAL.size
    if flags & _ENCRYPTED or method != 0 or data[name_start : name_start + name_length] != raw_name:
        raise UnsafeFileError(f"{where}: the header of entry {raw_name!r} contradicts the archive directory; the file was tampered with or damaged")
    return name_start + name_length + extra_length


def _refuse_overlap(entries: dict[str, Entry], where: str) -> None:
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.header):
        if entry.header < end:
            raise UnsafeFileError(f"{where}: entry {entry.name!r} overlaps another one; the file was tampered with or damaged")
        end = entry.start + entry.size
