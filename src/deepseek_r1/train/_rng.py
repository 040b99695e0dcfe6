"""Random generators: seeding all of them, and taking and putting back their states.

Knows python's, numpy's and torch's generators, those of a GPU too. Knows nothing about training or loaders.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..core import ConfigError
from ..data._generators import loader_state as loader_state
from ..data._generators import set_loader_state as set_loader_state


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed python, numpy and torch (CPU and CUDA).

    The same program on the same machine, with the same versions and thread count, then draws the same numbers.
    Call it before the model is made, so that its initial weights are covered.

    Args:
        seed: 0 to 2**32 - 1 (numpy's range).
        deterministic: also make torch use only deterministic kernels from now on; an operation that has none
            raises RuntimeError, and some are slower.

    Raises:
        ConfigError: a seed out of range.

    Example:
        >>> seed_everything(0)
        >>> a = torch.rand(2)
        >>> seed_everything(0)
        >>> bool((a == torch.rand(2)).all())
        True
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything({seed!r}): an integer from 0 to 2**32 - 1 is needed.")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        _use_deterministic()


def _use_deterministic() -> None:
    # cuBLAS is deterministic only with a fixed workspace, and reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """Only deterministic kernels inside the block, if `on`."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    _use_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """PyTorch on `count` CPU threads inside the block; None leaves the number alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of the global generators, and of `device`'s if it is a GPU."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` took."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside the block, the global generators are afterwards as they were before."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
