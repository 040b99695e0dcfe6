"""Memory of the C library while a CPU trains: what a step frees stays with the process for the next step.

Left alone, glibc gives large blocks back to the system as they are freed, so that every step is handed its activations
and gradients anew, page by page, cleared. Knows nothing about models.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from functools import cache

import torch

#: Numbers of glibc's `mallopt`.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
#: Nothing is mapped by itself, the end of the heap is never given back, and it grows in large pieces.
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
#: Where glibc's own thresholds arrive after the first large blocks; a call of `mallopt` ends their moving.
_USUAL = ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 64 << 20), (_TOP_PAD, 128 << 10), (_MMAP_THRESHOLD, 32 << 20))

_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Inside the block, freed memory stays with the process; at its end what is free goes back to the system.

    Nothing happens for another device than a CPU, under another C library than glibc, or where the environment has
    settings of its own for malloc (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    libc = _glibc() if device.type == "cpu" and not _settled_by_user() else None
    if libc is None:
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def _enter(libc: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set(libc, _KEEP)


def _leave(libc: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _set(libc, _USUAL)
            libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, values: tuple[tuple[int, int], ...]) -> None:
    for number, value in values:
        libc.mallopt(number, value)


def _settled_by_user() -> bool:
    tunables = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return tunables or any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
