"""One captured graph of a traced function: when it holds, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..program import Program
from ._guards import Guards, snapshot

#: (store, name, value) of each parameter and buffer.
Weights = list[tuple[dict[str, Any], str, Any]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One captured graph and when it holds."""

    program: Program
    tree: Any
    leaves: tuple[Any, ...]
    guards: Guards
    weights: Weights
    numbers: tuple[bool, ...]
    kept: dict[str, int]
    differentiable: bool
    within: Callable[..., Any] | None

    def misfit(self, tree: Any, leaves: list[Any]) -> str | None:
        """Why the graph does not hold for some inputs and the Python values as they are; None if it does."""
        if tree != self.tree:
            return f"the inputs nest as {tree} now"
        for given, wanted, name in zip(leaves, self.leaves, self.program.input_names()):
            if isinstance(wanted, _Tensor) and isinstance(given, torch.Tensor):
                if not wanted.fits(given):
                    return f"{name} is a {given.dtype} tensor of shape {tuple(given.shape)} on {given.device} now"
            elif isinstance(given, torch.Tensor) or snapshot(given) != wanted:
                return f"{name} is {given!r} now"
        if outside := self.program.outside(leaves):
            return outside
        if self.within is not None:
            try:
                self.within(*leaves)
            except (AssertionError, RuntimeError) as e:
                return f"a condition on sizes changed ({e})"
        return self.guards.changed()

    def outdated(self) -> bool:
        """Whether a parameter or buffer was replaced by another object, so that the graph never holds again."""
        return any(owner.get(name) is not weight for owner, name, weight in self.weights)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the graph gives; Python numbers are numbers again."""
        result = self.program.module()(*args, **kwargs)
        if not any(self.numbers):
            return result
        flat, tree = pytree.tree_flatten(result)
        flat = [v.item() if number else v for v, number in zip(flat, self.numbers)]
        return pytree.tree_unflatten(flat, tree)


@dataclass(frozen=True)
class _Tensor:
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int | str, ...]

    def fits(self, given: torch.Tensor) -> bool:
        if given.dtype != self.dtype or given.device != self.device or len(given.shape) != len(self.shape):
            return False
        return all(isinstance(s, str) or s == n for s, n in zip(self.shape, given.shape))


def described(leaves: list[Any], program: Program) -> tuple[Any, ...]:
    """What each flat input must be for a program to hold: a tensor of a type and shape, or a Python value."""
    return tuple(
        _Tensor(leaf.dtype, leaf.device, shape) if isinstance(leaf, torch.Tensor) else snapshot(leaf)
        for leaf, shape in zip(leaves, program.input_shapes(), strict=True)
    )


def weights_of(module: torch.nn.Module) -> Weights:
    """Every parameter and buffer of a module, where it is held."""
    found: Weights = []
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            found += [(store, name, value) for name, value in store.items()]
    return found


def differentiable(program: Program) -> bool:
    """Whether torch differentiates the graph rightly: no loops, no branch with mixed results.

    torch 2.13 takes a loop of no turns for one of one turn, and fails on a branch that gives floating-point and
    other tensors at once.
    """
    for part in program.exported.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            if node.target is torch.ops.higher_order.while_loop:
                return False
            if node.target is torch.ops.higher_order.cond:
                results = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
                if len({v.is_floating_point() for v in results}) > 1:
                    return False
    return True


def within(program: Program) -> Callable[..., Any] | None:
    """torch's own check of the conditions on sizes that the capture met, if it met any."""
    if not getattr(program.exported, "_guards_code", None):
        return None
    checked: Any = getattr(program.exported.module(), "_guards_fn", None)
    return checked  # type: ignore[no-any-return]
