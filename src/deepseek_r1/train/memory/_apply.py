"""Running a model under a plan: each block's call is kept, recomputed or offloaded as its entry says.

Knows what is to be done, not why. Nothing on the model changes but the way its blocks are called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...core import InputError
from ._compress import compressed
from ._intercept import Interception
from ._meter import Meter
from ._offload import Offloader
from ._partial import partial_form
from ._region import TOGETHER, Region
from ._selective import Operator, contexts

KEEP, RECOMPUTE, SELECTIVE, PARTIAL = "keep", "recompute", "selective", "partial"
OFFLOAD, COMPRESS = "offload", "compress"


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What one block of a model does with the tensors that its backward pass needs.

    Attributes:
        modules: names of the modules that make up the block, in the order of their calls.
        calls: for each module, which of its calls in one forward pass this is, from 0.
        action: "keep", "recompute", "selective" (recomputed but for some operators' outputs), "partial" (a compiled
            block that saves a share), "offload" or "compress" (saved in 8 bits).
        run: blocks with the same number are recomputed together, from the input of the first.
        mode: how a run of several blocks is computed again: "together", "each" or "tree".
        kept_operators: those of a "selective" block.
        share: of what a "partial" block would save.
        draws: whether it drew random numbers when it was measured.
    """

    modules: tuple[str, ...]
    calls: tuple[int, ...]
    action: str = KEEP
    run: int = 0
    mode: str = TOGETHER
    kept_operators: tuple[Operator, ...] = ()
    share: float = 1.0
    draws: bool = False


class Applied:
    """A model with a plan in force, until `remove`; also a context manager.

    Blocks act only where gradients are recorded; evaluation under `torch.no_grad()` is left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[BlockPlan],
        *,
        buffers: Mapping[str, tuple[tuple[str, str], ...]] | None = None,
        compiled: bool = False,
        meter: Meter | None = None,
        after_block: Callable[[int, Region | None], None] | None = None,
    ) -> None:
        self._blocks = tuple(blocks)
        self._meter, self._after_block = meter, after_block
        self._places = {
            (name, call): (index, position)
            for index, block in enumerate(self._blocks)
            for position, (name, call) in enumerate(zip(block.modules, block.calls, strict=True))
        }
        self._calls = Counter(name for name, _ in self._places)
        self._last_of_run = {block.run: index for index, block in enumerate(self._blocks)}
        self._modules = {name: _module(model, name) for name in self._calls}
        self._buffers: dict[str, list[tuple[nn.Module, str]]] = {}
        for name, inner in (buffers or {}).items():
            if name in self._modules:
                self._buffers[name] = [(_module(self._modules[name], path), buffer) for path, buffer in inner]
        self._next: Counter[str] = Counter()
        self._open: dict[int, Region] = {}
        self._forms: dict[tuple[str, float], Callable[..., Any]] = {}
        self._offloader = Offloader()
        self._inside = False
        self._interception = [Interception(self._modules, self._handle, compiled=compiled)]
        if "" not in self._modules:
            self._interception.append(Interception({"": model}, self._whole))

    def remove(self) -> None:
        """Let the model's blocks be called as before; twice does no harm."""
        for interception in reversed(self._interception):
            interception.remove()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _whole(self, _: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A forward pass that failed half-way must not shift the counting of the next one.
        self._next.clear()
        self._open.clear()
        self._inside = False
        output = run(*args, **kwargs)
        self._offloader.settle()
        return output

    def _handle(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        call = self._next[name]
        self._next[name] = (call + 1) % self._calls[name]
        index, position = self._places[name, call]
        block = self._blocks[index]
        if self._meter is not None and position == 0:
            self._meter.mark(("forward", index))
        self._inside = True
        try:
            output = self._run(index, position, name, run, args, kwargs)
        finally:
            self._inside = False
        if position == len(block.modules) - 1:
            self._end_block(index, output)
        return output

    def _run(
        self,
        index: int,
        position: int,
        name: str,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        block = self._blocks[index]
        if block.action == KEEP:
            return run(*args, **kwargs)
        if block.action == OFFLOAD:
            return self._offloader.call(run, args, kwargs)
        if block.action == COMPRESS:
            return compressed(run, args, kwargs)
        if block.action == PARTIAL:
            return self._partial(name, block.share, run)(*args, **kwargs)
        region = self._open.get(block.run)
        if region is None:
            kept = contexts(frozenset(block.kept_operators)) if block.action == SELECTIVE else None
            region = self._open[block.run] = Region(block.mode, kept)
        known = self._buffers.get(name)
        every = known if known is not None else buffers_of(self._modules[name])
        output = region.call(run, args, kwargs, buffers=every, new_group=position == 0)
        if known is None:
            self._buffers[name] = region.keep_changed_buffers()
        return output

    def _partial(self, name: str, share: float, run: Callable[..., Any]) -> Callable[..., Any]:
        if (name, share) not in self._forms:
            self._forms[name, share] = partial_form(run, share)
        return self._forms[name, share]

    def _end_block(self, index: int, output: Any) -> None:
        block = self._blocks[index]
        region = self._open.get(block.run)
        if self._last_of_run[block.run] == index:
            self._open.pop(block.run, None)
        if self._meter is not None:
            self._meter.mark(("gap", index))
            meter = self._meter
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: meter.mark(("backward", index)))
        if self._after_block is not None:
            self._after_block(index, region)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        raise InputError(
            f"the plan has a block {name!r}, which {type(model).__name__} has not; it was made for another model."
        ) from e


def buffers_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every buffer below a module, with the module that owns it."""
    return [(inner, name) for inner in module.modules() for name, value in inner._buffers.items() if value is not None]
