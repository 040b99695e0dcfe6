"""What a module answers when channels are switched off instead of removed: the reference that surgery is judged by.

The captured graph runs in float64. Behind each operator the removed channels are zero; means and variances over a
dimension that loses channels are taken over those that stay. Knows nothing of the module's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Interpreter, Node

from ..graph import float64_module, to_float64
from ._ledger import Dims
from ._rules import SUMS, reduced
from ._structure import Structure

aten = torch.ops.aten
#: Kept indices of the dimensions of a value that lose some.
Kept = dict[int, Tensor]


def masked_answers(structure: Structure, removed: Any, state: Mapping[str, Tensor]) -> list[Tensor]:
    """The flat outputs of the captured graph in float64 with units (a mask) switched off.

    Args:
        state: values of parameters and buffers, by the names the structure knows them under.
    """
    module = float64_module(structure.program)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            known = structure.aliases.get(name, name)
            if known in state:
                tensor.copy_(state[known])
        own = {node.name: node for node in structure.values}
        runner = _Masked(module, structure, removed, own)
        args, kwargs = to_float64(structure.program.example_inputs)
        leaves = pytree.tree_leaves((args, kwargs))
        found = runner.run(*[v.clone() if isinstance(v, Tensor) else v for v in leaves])
    return [v for v in pytree.tree_leaves(found) if isinstance(v, Tensor)]


class _Masked(Interpreter):
    """Runs a graph and switches channels off behind each operator."""

    def __init__(self, module: Any, structure: Structure, removed: Any, own: Mapping[str, Node]) -> None:
        super().__init__(module)
        self.structure, self.removed, self.own = structure, removed, own

    def run_node(self, n: Node) -> Any:
        known = self.structure.values.get(self.own.get(n.name, n))
        compact = self._over_the_kept(n)
        result = compact() if compact is not None else super().run_node(n)
        if isinstance(result, Tensor) and isinstance(known, tuple) and n.op != "output":
            return self._off(result, known, in_place=_in_place(n))
        return result

    def kept(self, dims: Dims) -> Kept:
        """Kept indices of the dimensions that lose some."""
        found = {}
        for dim, atoms in enumerate(dims):
            if atoms is not None and (gone := self.removed[self.structure.unit_of[atoms]]).any():
                found[dim] = torch.from_numpy(~gone).nonzero().flatten()
        return found

    def _off(self, value: Tensor, dims: Dims, *, in_place: bool) -> Tensor:
        for dim, kept in self.kept(dims).items():
            gone = torch.ones(value.shape[dim], dtype=torch.bool, device=value.device)
            gone[kept.to(value.device)] = False
            at = gone.nonzero().flatten()
            if in_place:
                value.index_fill_(dim, at, 0)
            else:
                value = value.index_fill(dim, at, 0)
        return value

    def _over_the_kept(self, n: Node) -> Callable[[], Any] | None:
        """A way to compute a norm or mean without the channels that left; None for every other operator."""
        kinds = {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, *SUMS}
        if n.op != "call_function" or n.target not in kinds:
            return None
        source = self.own.get(n.args[0].name)  # type: ignore[union-attr, arg-type]
        known = self.structure.values.get(source, ()) if source is not None else ()
        kept = self.kept(known) if isinstance(known, tuple) else {}
        rank = len(known)
        if n.target in SUMS:
            along = set(reduced(self.own[n.name]))
        elif n.target is aten.group_norm.default:
            along = {1} if self._inside_groups(n, kept, known) else set()
        else:
            along = set(range(rank - len(n.args[1]), rank))  # type: ignore[arg-type]
        kept = {d: i for d, i in kept.items() if d in along}
        return (lambda: self._compact(n, kept, rank)) if kept else None

    @staticmethod
    def _inside_groups(n: Node, kept: Kept, known: Any) -> bool:
        """Whether a group norm loses places of each group, and not whole groups, which need no care."""
        if 1 not in kept:
            return False
        groups = int(n.args[1])  # type: ignore[arg-type]
        return groups < known[1].size // groups or groups == 1

    def _compact(self, n: Node, kept: Kept, rank: int) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = args[0]
        full = value.shape
        kept = {dim: at.to(value.device) for dim, at in kept.items()}
        for dim, at in kept.items():
            value = value.index_select(dim, at)
        rest = list(args[1:])
        if n.target in SUMS:
            return n.target(value, *rest, **kwargs)  # type: ignore[operator]
        first = 1 if n.target is aten.group_norm.default else rank - len(rest[0])
        if n.target is not aten.group_norm.default:
            rest[0] = list(value.shape[first:])
        for i in range(1, len(rest)):
            for dim, at in kept.items():
                if isinstance(rest[i], Tensor):
                    rest[i] = rest[i].index_select(dim - first, at)
        small = n.target(value, *rest, **kwargs)  # type: ignore[operator]
        for dim, at in kept.items():
            shape = [*small.shape[:dim], full[dim], *small.shape[dim + 1 :]]
            small = small.new_zeros(shape).index_copy(dim, at, small)
        return small


def _in_place(n: Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return schema is not None and str(schema.name).endswith("_")
