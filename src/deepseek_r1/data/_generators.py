"""States of random generators: the process's own, and those that a loader and its samplers hold.

Knows where python, numpy, torch and a DataLoader keep their generators. Knows nothing about batches or training.
States are tensors, tuples and plain numbers, so that a file without pickle can hold them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def process_state() -> dict[str, Any]:
    """States of the generators of python's `random`, numpy's `np.random` and torch (CPU)."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }


def set_process_state(state: dict[str, Any]) -> None:
    """Put back what `process_state` took."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(np.asarray(words).tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())


def same_process_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two states of the process's generators would give the same numbers."""
    pairs = [(a["torch"].cpu(), b["torch"].cpu())] + [
        (torch.as_tensor(np.asarray(a[name][1])), torch.as_tensor(np.asarray(b[name][1])))
        for name in ("python", "numpy")
    ]
    return all(torch.equal(x, y) for x, y in pairs) and a["numpy"][2] == b["numpy"][2]


@contextlib.contextmanager
def kept_process_state() -> Iterator[None]:
    """Whatever is drawn inside the block, the process's generators are afterwards as they were before."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def seed_process(seed: int) -> None:
    """Seed the process's generators on the CPU; those of a GPU are left alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would seed the GPUs too.
    torch.default_generator.manual_seed(seed)


def mixed_seed(*parts: int) -> int:
    """One number of 63 bits from several, such that neighbours have nothing in common (the SplitMix64 finaliser).

    Source: G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.

    Example:
        >>> mixed_seed(1, 0, 0) == mixed_seed(1, 0, 0), mixed_seed(1, 0, 0) == mixed_seed(0, 1, 0)
        (True, False)
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def _owners(loader: Any) -> Iterator[tuple[str, Any]]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    yield "loader", loader
    yield "sampler", getattr(loader, "sampler", None)
    yield "batch_sampler", batch_sampler
    yield "batch_sampler.sampler", getattr(batch_sampler, "sampler", None)


def _generators(loader: Any) -> Iterator[tuple[str, Any]]:
    """Generators that the loader and its samplers hold as attributes, each once, under stable names."""
    seen: set[int] = set()
    for where, owner in _owners(loader):
        for name, value in sorted(getattr(owner, "__dict__", {}).items()):
            known = isinstance(value, torch.Generator | np.random.Generator | random.Random)
            if known and id(value) not in seen:
                seen.add(id(value))
                yield f"{where}.{name}", value


def _samplers(loader: Any) -> Iterator[tuple[str, Any]]:
    """Samplers that can tell and take back their own state."""
    for where, owner in _owners(loader):
        if where != "loader" and hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
            yield where, owner


def loader_state(loader: Any) -> dict[str, Any]:
    """States of the generators and stateful samplers that belong to a loader, and the passes it has begun."""
    state: dict[str, Any] = {}
    for name, generator in _generators(loader):
        if isinstance(generator, torch.Generator):
            state[name] = generator.get_state()
        elif isinstance(generator, np.random.Generator):
            state[name] = generator.bit_generator.state
        else:
            state[name] = generator.getstate()
    samplers = {name: sampler.state_dict() for name, sampler in _samplers(loader)}
    return {"generators": state, "samplers": samplers, "passes": getattr(loader, "passes_begun", None)}


def set_loader_state(loader: Any, state: dict[str, Any]) -> None:
    """Put back what `loader_state` took."""
    for name, generator in _generators(loader):
        saved = state["generators"].get(name)
        if saved is None:
            continue
        if isinstance(generator, torch.Generator):
            generator.set_state(saved.cpu())
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = saved
        else:
            generator.setstate(saved)
    for name, sampler in _samplers(loader):
        if name in state["samplers"]:
            sampler.load_state_dict(state["samplers"][name])
    if state.get("passes") is not None and hasattr(loader, "passes_begun"):
        loader.passes_begun = state["passes"]
