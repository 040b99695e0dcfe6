"""The manual knobs: recompute every run of k blocks, or a whole chain recursively. No measuring, no planning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...core import ConfigError, InputError
from ._apply import buffers_of
from ._intercept import Interception
from ._region import TOGETHER, TREE, Region, version
from ._units import find_blocks


class Checkpointed:
    """A model whose blocks are recomputed in runs, until `remove`; also a context manager.

    Runs form while the model runs: a block joins the run before it if its input is that run's last output.
    """

    def __init__(self, model: nn.Module, length: int | None, *, mode: str = TOGETHER, compiled: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"checkpointing {type(model).__name__}: an nn.Module is needed.")
        found = find_blocks(model)
        composite = {name: module for name, module in found.items() if next(module.children(), None) is not None}
        self._modules = composite or found
        self._length, self._mode = length, mode
        self._buffers: dict[str, list[tuple[nn.Module, str]]] = {}
        self._region: Region | None = None
        self._joined = 0
        self._last: list[tuple[Tensor, int]] = []
        self._inside = False
        self._interception = [Interception(self._modules, self._handle, compiled=compiled)]
        if "" not in self._modules:
            self._interception.append(Interception({"": model}, self._whole))

    def remove(self) -> None:
        """Let the model's blocks be called as before; twice does no harm."""
        for interception in reversed(self._interception):
            interception.remove()

    def __enter__(self) -> Checkpointed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _whole(self, _: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._region, self._last, self._inside = None, [], False
        try:
            return run(*args, **kwargs)
        finally:
            self._region, self._last = None, []

    def _handle(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        module = self._modules[name]
        in_place = bool(getattr(module, "inplace", False))
        linked = self._linked((args, kwargs))
        region = self._region
        if region is None or not linked or (self._joined == self._length and not in_place):
            if in_place:
                # It destroys its input, which no run that began with it could be given again.
                return run(*args, **kwargs)
            region = self._region = Region(self._mode)
            self._joined = 0
        self._joined += not in_place
        known = self._buffers.get(name)
        self._inside = True
        try:
            every = known if known is not None else buffers_of(module)
            output = region.call(run, args, kwargs, buffers=every, new_group=not in_place)
        finally:
            self._inside = False
        if known is None:
            self._buffers[name] = region.keep_changed_buffers()
        self._last = [(t, version(t)) for t in tree_leaves(output) if isinstance(t, Tensor)]
        return output

    def _linked(self, given: Any) -> bool:
        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        return any(leaf is known and version(leaf) == seen for leaf in leaves for known, seen in self._last)


def checkpoint_every(model: nn.Module, interval: int, *, compiled: bool = False) -> Checkpointed:
    """Recompute a model's blocks in runs of `interval`: only the input of every run is kept.

    Gradients are those of the plain model. `.remove()` on the result, or leaving its `with` block, ends it.

    Args:
        model: its blocks are the children of its lists and sequences (see docs/memory.md).
        interval: 1 recomputes each block by itself. Longer runs keep fewer inputs, and while a run's gradients are
            computed hold more.
        compiled: run the blocks through `torch.compile`.

    Raises:
        ConfigError: the interval is no integer >= 1.

    Source: Chen et al., arXiv 1604.06174.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
        >>> with checkpoint_every(net, 2):
        ...     net(torch.ones(1, 4)).sum().backward()
    """
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ConfigError(f"checkpoint_every(interval={interval!r}): an integer >= 1 is needed.")
    return Checkpointed(model, interval, compiled=compiled)


def checkpoint_recursively(model: nn.Module, *, compiled: bool = False) -> Checkpointed:
    """Recompute a chain of n blocks with about log2(n) of their inputs alive.

    That takes about n/2 * log2(n) more forward passes of a block. Halves of the chain are recomputed when the backward
    pass reaches them, halves of halves within: for chains so deep that even one input for each block is too much.

    Source: Griewank and Walther, "Revolve", ACM TOMS 26 (2000), in its simplest form (bisection).

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)))
        >>> with checkpoint_recursively(net):
        ...     net(torch.ones(1, 4)).sum().backward()
    """
    return Checkpointed(model, None, mode=TREE, compiled=compiled)
