"""One pass over a loader, in windows of batches, that can begin in the middle exactly as it was before.

Knows loaders and random generators. Knows nothing about models.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..core import InputError
from ._rng import loader_state, rng_state, set_loader_state, set_rng_state

#: A worker whose connection broke is told dead within this time.
_DEATH_TOLD_S = 1.0


def epoch_start(loader: Any, device: torch.device) -> dict[str, Any]:
    """Everything that decides which batches the next pass gives: taken before it begins."""
    if _can_skip(loader):
        return {"rng": rng_state(device), "pass": loader.next_pass_state()}
    return {
        "rng": rng_state(device),
        "loader": loader_state(loader),
        # Living workers do not draw a new base seed, which shifts every later draw.
        "workers_alive": getattr(loader, "_iterator", None) is not None,
    }


def _can_skip(loader: Any) -> bool:
    """Whether a loader goes to a place in a pass by itself, as DSDataLoader does, without reading what is before."""
    return hasattr(loader, "next_pass_state") and hasattr(loader, "load_state_dict")


@dataclass(frozen=True)
class Place:
    """A place within an epoch to go on from.

    Attributes:
        start: what `epoch_start` gave when the epoch began, or was about to.
        skip: batches that were already taken.
        rng: states of the global generators at the place.
    """

    start: dict[str, Any]
    skip: int
    rng: dict[str, Any]


def batches(loader: Any, epoch: int, device: torch.device, place: Place | None = None) -> Iterator[Any]:
    """The batches of epoch number `epoch` (from 0), from `place` on if it is given.

    To reach the place, the generators are set to the epoch's start and the batches before it are drawn and thrown
    away. A loader that finds the place itself (`next_pass_state` and `load_state_dict`) is left to do so.
    What is replayed exactly: every order that is drawn from torch's, numpy's or python's global generators
    when the pass begins, or at any time from generators that belong to the loader or its samplers; and workers' own
    randomness, unless the workers outlive the epoch.

    Raises:
        InputError: the loader fails, or gives fewer batches than were taken from it before.
    """
    if place is not None and "pass" in place.start and _can_skip(loader):
        return _resumed(loader, epoch, device, place)
    if place is not None:
        if "pass" in place.start:
            raise InputError(
                "the checkpoint was written in the middle of an epoch of a DSDataLoader; resume with one made alike."
            )
        if place.start["workers_alive"] and getattr(loader, "_iterator", None) is None:
            iter(loader)
        set_rng_state(place.start["rng"], device)
        set_loader_state(loader, place.start["loader"])
    _set_epoch(loader, epoch)
    iterator = _failing_clearly(loader, epoch)
    if place is None or place.skip == 0:
        return iterator
    for done in range(place.skip):
        if next(iterator, iterator) is iterator:
            raise InputError(
                f"the checkpoint was written after batch {place.skip} of epoch {epoch + 1}, but the loader gives only "
                f"{done} batches; resume with the data and the batch size that the run began with."
            )
    set_rng_state(place.rng, device)
    return iterator


def _resumed(loader: Any, epoch: int, device: torch.device, place: Place) -> Iterator[Any]:
    """The rest of a pass of a loader that finds its place itself."""
    set_rng_state(place.start["rng"], device)
    _set_epoch(loader, epoch)
    loader.load_state_dict({**place.start["pass"], "batch": place.skip})
    rest = iter(loader)
    if place.skip:
        set_rng_state(place.rng, device)
    return _failing_clearly(rest, epoch, place.skip)


def _set_epoch(loader: Any, epoch: int) -> None:
    for owner in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        set_epoch = getattr(owner, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _failing_clearly(loader: Any, epoch: int, number: int = 0) -> Iterator[Any]:
    try:
        # Under a name, so that it is cleared away after its failure was looked at.
        iterator = iter(loader)
        for batch in iterator:
            number += 1
            yield batch
    except GeneratorExit:
        raise
    except Exception as e:
        if isinstance(e, InputError) and not _from_worker(str(e)):
            raise
        try:
            raise _failed(e, f"batch {number + 1} of epoch {epoch + 1}") from e
        except RuntimeError as gone:
            # The handler by which torch tells a worker's death may run just here.
            raise _failed(gone, f"batch {number + 1} of epoch {epoch + 1}") from gone


def _failed(e: Exception, what: str) -> InputError:
    text = _in_short(e).rstrip(".")
    return InputError(f"the loader failed while making {what}: {text}. {_advice(e, text)}")


def worker_died(e: RuntimeError, epoch: int) -> InputError | None:
    """The error to show for a worker's death that torch tells wherever the process is, as in a step; else None."""
    if re.match(r"DataLoader worker \(pid", str(e)) is None:
        return None
    return _failed(e, f"batches of epoch {epoch + 1}")


def _from_worker(text: str) -> bool:
    return "DataLoader worker process" in text


def _in_short(e: Exception) -> str:
    """An error in one line, with the notes that were added to it."""
    lines = [line for line in str(e).strip().splitlines() if line.strip()]
    if _from_worker(str(e)):
        # Errors out of a worker process carry their whole traceback as text.
        return f"{' '.join(_raised(lines))[:600].rstrip('.')}{_worker_place(lines)}"
    text = " ".join([*lines[:1], *getattr(e, "__notes__", ())])
    return text if text.startswith(type(e).__name__) else f"{type(e).__name__}: {text}".rstrip(": ")


def _raised(lines: list[str]) -> list[str]:
    """What was raised, and notes, of a traceback: what stands behind the last frame and its source."""
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] + 1 :] if frames else lines
    own = next((i for i, line in enumerate(after) if not line.startswith("    ")), 0)
    # The class is written with its module.
    first = re.sub(r"^(?:\w+\.)+(?=\w+(?::|$))", "", after[own]) if after else "an error"
    return [first, *(line.strip() for line in after[own + 1 :])]


def _ended_from_outside(e: Exception, text: str) -> bool:
    """Whether the error is that a worker process is gone, as this process sees it."""
    if re.search(r"exited unexpectedly|killed by signal|bus error|shared memory", text, re.IGNORECASE):
        return True
    frames = traceback.extract_tb(e.__traceback__)
    broken = isinstance(e, ConnectionError | EOFError) and any(
        f"{os.sep}multiprocessing{os.sep}" in f[0] for f in frames
    )
    if broken:
        # The connection breaks before the system tells of the death, upon which torch raises wherever the process is
        # by then: better here.
        time.sleep(_DEATH_TOLD_S)
    return broken


def _advice(e: Exception, text: str) -> str:
    if _ended_from_outside(e, text):
        return (
            "A worker process was ended from outside: mostly because memory ran out (use fewer num_workers, a smaller "
            "prefetch_factor or batch) or /dev/shm did, through which batches come (in a container raise --shm-size); "
            "or a library crashed in it, which num_workers=0 shows."
        )
    if re.search(r"equal size|same (shape|size)|resize storage", text):
        return "Every sample of a batch must have the same shape: pad or crop them, or give the loader a collate_fn."
    return "The error above says where it began."


def _worker_place(lines: list[str]) -> str:
    found = re.findall(r'File "(.+?)", line (\d+)', "\n".join(lines))
    own = [place for place in found if f"{os.sep}site-packages{os.sep}" not in place[0]] or found
    return f" (in the worker: {Path(own[-1][0]).name}, line {own[-1][1]})" if own else ""


def windows(iterator: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` batches; the last one may be shorter.

    Example:
        >>> list(windows(iter("abc"), 2))
        [['a', 'b'], ['c']]
    """
    while window := list(islice(iterator, size)):
        yield window


def check_loader(loader: Any, name: str) -> None:
    """Raise InputError unless `loader` can be read batch by batch. Reads nothing."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise InputError(
            f"Trainer({name}={loader!r}): a DataLoader, or another iterable of batches, is needed; "
            f"{type(loader).__name__} cannot be iterated over."
        )


def steps_in_epoch(loader: Any, size: int) -> int | None:
    """Windows of `size` batches in one pass, or None if the loader has no length.

    Raises:
        InputError: the loader is empty.
    """
    count = loader_length(loader)
    if count == 0:
        raise empty_loader(loader)
    return None if count is None else -(-count // size)


def loader_length(loader: Any) -> int | None:
    """Batches in one pass as the loader says, or None if it does not."""
    try:
        return len(loader)
    except TypeError:
        return None


def size_note(loader: Any) -> str:
    """What a user may want to know of a loader whose batch is larger than its dataset; else empty."""
    size = getattr(loader, "batch_size", None)
    try:
        samples = len(loader.dataset)
    except (AttributeError, TypeError):
        return ""
    if not isinstance(size, int) or size <= samples:
        return ""
    return f"data: the batch of {size} is larger than the dataset of {samples} samples, so an epoch is one small batch"


def empty_loader(loader: Any) -> InputError:
    """The error for a loader that gives no batch, with the likely cause."""
    try:
        samples: int | None = len(loader.dataset)
    except (AttributeError, TypeError):
        samples = None
    if samples and getattr(loader, "drop_last", False):
        return InputError(
            f"the loader gives no batches: drop_last=True drops the only one, as the dataset has {samples} samples and "
            f"the batch size is {loader.batch_size}. Use drop_last=False or a smaller batch."
        )
    if samples == 0:
        return InputError("the loader gives no batches: its dataset is empty (0 samples). Check the path or the split.")
    return InputError(
        "the loader gives no batches. If it is a generator it can be read only once: give a DataLoader or a list."
    )
