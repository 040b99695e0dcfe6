"""TensorBoard event files with scalars: records as TFRecord frames them, each a protocol buffer encoded here.

The formats: Event and Summary as in TensorBoard's `event.proto` and `summary.proto`; the wire format of protocol
buffers (https://protobuf.dev/programming-guides/encoding/); TFRecord's frame of length, checksum, data, checksum, with
checksums by CRC-32C (Castagnoli; RFC 3720, appendix B.4). Knows nothing about training.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: Fields of Event, Summary, Summary.Value and SessionLog.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = 1, 2, 3, 5, 7
_VALUE, _TAG, _SIMPLE_VALUE, _STATUS = 1, 1, 2, 1
_START = 1


def _table() -> tuple[int, ...]:
    entries = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


_CRC = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """A checksum as TFRecord stores it, so that a checksum of data with checksums in it does not degenerate."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc32c(length))) + data + struct.pack("<I", masked(crc32c(data)))


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _message(field: int, data: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(data)) + data


def _event(wall_time: float, step: int, body: bytes) -> bytes:
    head = _key(_WALL_TIME, _FIXED64) + struct.pack("<d", wall_time)
    return head + (_key(_STEP, _VARINT) + _varint(step) if step else b"") + body


def scalars_event(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """The Event that gives some scalars at a step; each key of `values` is a tag."""
    summary = b"".join(
        _message(
            _VALUE,
            _message(_TAG, tag.encode()) + _key(_SIMPLE_VALUE, _FIXED32) + struct.pack("<f", value),
        )
        for tag, value in values.items()
    )
    return _event(wall_time, step, _message(_SUMMARY, summary))


class EventFile:
    """A new event file in a directory; every write is one whole record, handed to the system at once.

    Args:
        folder: the directory, made if it is not there.
        first_step: the first step that will be written, where earlier files in the directory may have gone further:
            TensorBoard then drops what they say from this step on.
    """

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads the files of a directory in the order of their names.
        stem = f"events.out.tfevents.{int(now * 1000):013d}.{socket.gethostname()}.{os.getpid()}"
        self.path = next(p for i in range(10**6) if not (p := folder / f"{stem}.{i}").exists())
        self._file = self.path.open("xb", buffering=0)
        self._file.write(record(_event(now, 0, _message(_FILE_VERSION, b"brain.Event:2"))))
        if first_step is not None:
            started = _message(_SESSION_LOG, _key(_STATUS, _VARINT) + _varint(_START))
            self._file.write(record(_event(now, first_step, started)))

    def add(self, step: int, values: Mapping[str, float], wall_time: float | None = None) -> None:
        """Write scalars by tag. Raises OSError as the file system gives it."""
        self._file.write(record(scalars_event(time.time() if wall_time is None else wall_time, step, values)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
