"""`Program`: one captured static graph, with what is needed to run, rewrite, save and compare it."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..core import InputError, Report
from ._foreign_nests import described
from ._signature import Signature, signature_of
from .quiet import quiet_torch

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A captured static graph.

    It shares its weights with the module it was captured from: training that module further changes the program's
    answers too. A Program is a value: rewriting one gives a new one.

    Attributes:
        exported: the graph as torch.export made it.
        example_inputs: positional and keyword inputs it was captured with.
        precision: a name from `core.formats.PRECISIONS`.
        parent: the float Program a quantised one came from.
        source: the Program a simplified one was made from. Weights that a pass rewrote are copies, so what follows
            training further has to watch the source's weights, and simplify the source again. It is not saved.
        conditions: what the module's branches asked of the inputs' sizes, over `size_<flat input>_<axis>`.
        report: what the last stage did.

    Example:
        >>> import torch
        >>> from deepseek_r1.graph import capture
        >>> program = capture(torch.nn.Linear(4, 2), torch.randn(3, 4))
        >>> program(torch.randn(7, 4)).shape
        torch.Size([7, 2])
    """

    exported: ExportedProgram
    example_inputs: tuple[Args, Kwargs]
    name: str = "model"
    precision: str = "fp32"
    parent: Program | None = None
    source: Program | None = None
    conditions: tuple[str, ...] = ()
    report: Report = field(default_factory=lambda: Report("program"))

    @cached_property
    def _module(self) -> GraphModule:
        module: GraphModule = self.exported.module(check_guards=False)  # type: ignore[assignment]
        return module

    def module(self) -> GraphModule:
        """The graph as a module, sharing this program's weights."""
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as the module it came from.

        Raises:
            InputError: the inputs do not fit the captured graph; the message gives both.
        """
        signature = self.signature
        leaves = signature.leaves(args, kwargs)
        if leaves is None or signature.outside(leaves):
            raise InputError(signature.misfit(args, kwargs) or "the inputs do not fit.")
        try:
            return self._module(*args, **kwargs)
        except Exception as e:
            # Only a misfit of the inputs is the caller's; everything else is passed on as it is.
            if misfit := signature.misfit(args, kwargs):
                raise InputError(misfit) from e
            raise

    @cached_property
    def signature(self) -> Signature:
        """What goes in and what comes out; prints as `x: float32[s0, 4] on cpu`."""
        return signature_of(self.exported, self.example_inputs, self.name, self.conditions)

    def misfit(self, args: Args, kwargs: Kwargs) -> str | None:
        """Why these inputs do not fit, or None if they do."""
        return self.signature.misfit(args, kwargs)

    def outside(self, leaves: Sequence[Any]) -> str:
        """Why flat inputs (dtype, rank, sizes) are not among those that the graph holds for; empty if they are."""
        return self.signature.outside(leaves)

    def updates(self) -> tuple[list[str], list[str]]:
        """What running the graph changes: names of the module's buffers, and of inputs."""
        changes = self.exported.graph_signature
        names = {**changes.inputs_to_buffers, **changes.inputs_to_parameters}
        held = {str(n.name): names[str(n.name)] for n in self.exported.graph.nodes if str(n.name) in names}
        found = {*changes.buffers_to_mutate.values()}
        inputs = {*changes.user_inputs_to_mutate.values()}
        for node in self.exported.graph.nodes:
            for name in _written(node):
                if name in held:
                    found.add(held[name])
                elif name in changes.user_inputs:
                    inputs.add(name)
        return sorted(found), sorted(inputs)

    def input_shapes(self) -> list[tuple[int | str, ...]]:
        """Shape of each flat input; a dynamic dimension is its symbol's name. Non-tensors give ()."""
        return [slot.shape for slot in self.signature.slots]

    def input_names(self) -> list[str]:
        """Names of the flat inputs, as the graph gives them."""
        return [slot.name for slot in self.signature.slots]

    def dynamic_shapes(self, most: Mapping[tuple[int, int], int] | None = None) -> Any:
        """The `dynamic_shapes` argument with which torch.export captures this graph again.

        Args:
            most: largest sizes, by (flat input, axis), for those who need a bound.
        """
        leaves = pytree.tree_leaves(self.example_inputs)
        # A new capture sees the graph, not the module, so it must be told what the module's branches allow.
        limits = self.signature.limits
        bounds = {(i, axis): (low, high) for i, axis, _, low, high in limits if low or high < math.inf}
        for place, size in (most or {}).items():
            low, high = bounds.get(place, (0, math.inf))
            bounds[place] = (low, min(high, size))
        specs = [
            {axis: _dim(*bounds.get((i, axis), (0, math.inf))) for axis, d in enumerate(shape) if isinstance(d, str)}
            if isinstance(leaf, torch.Tensor)
            else None
            for i, (leaf, shape) in enumerate(zip(leaves, self.input_shapes()))
        ]
        rest = iter(specs)
        args, kwargs = described(self.example_inputs, lambda _: next(rest))
        if not kwargs:
            return args
        # torch.export wants one mapping by argument name as soon as keywords are in play.
        return {**dict(zip(inspect.signature(self._module.forward).parameters, args)), **kwargs}

    @property
    def parameters_bytes(self) -> int:
        """Bytes of all parameters and buffers, shared storage counted once."""
        seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.exported.state_dict.values()}
        return sum(seen.values())

    def content_hash(self) -> str:
        """SHA-256 over graph, weights and constants as they are now; traces and versions do not count."""
        from ._checks import plain_graph
        from ._compat import graph_to_json

        digest = hashlib.sha256(plain_graph(graph_to_json(self.exported)))
        for store in (self.exported.state_dict, self.exported.constants):
            for name, tensor in sorted(store.items()):
                if isinstance(tensor, torch.Tensor):
                    plain = tensor.detach().cpu().contiguous().reshape(-1)
                    digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                    digest.update(plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str], *, with_parent: bool = True) -> Path:
        """Write the program to one file, whole or not at all.

        Args:
            with_parent: also the float parent of a quantised program, which `optimize` races it against.
        """
        from ._container import save

        return save(self if with_parent else replace(self, parent=None), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read a program written by `save`. Raises ArtifactError or UnsafeFileError; runs no code from the file."""
        from ._container import load

        return load(path)


def _written(node: Node) -> list[str]:
    """Names of the values that an operator writes into."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    named = zip(node.target._schema.arguments, node.args)
    written = [v.name for a, v in named if a.alias_info is not None and a.alias_info.is_write and isinstance(v, Node)]
    # Batch normalisation in training writes its statistics, which its schema does not say.
    if node.target is torch.ops.aten.batch_norm.default and len(node.args) > 5 and node.args[5] is True:
        written += [v.name for v in node.args[3:5] if isinstance(v, Node)]
    return written


def _dim(low: int, high: float) -> Any:
    auto: Any = torch.export.Dim.AUTO
    if not low and high == math.inf:
        return auto
    return auto(min=low or None, max=None if high == math.inf else int(high))


def float64_module(program: Program) -> GraphModule:
    """A deep copy of the graph that computes in float64: the reference that float32 answers are judged by.

    The user's own parameters are left alone. Casts to float32 or less inside the graph become casts to float64.
    """
    with quiet_torch():
        return float64_copy(program.exported.module(check_guards=False))  # type: ignore[arg-type]


def float64_copy(module: GraphModule) -> GraphModule:
    """A deep copy of a graph, with everything inside it in float64."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if not isinstance(part, GraphModule):
            continue
        for node in part.graph.nodes:
            node.args, node.kwargs = as_double((node.args, node.kwargs))
        part.recompile()
    return module


def to_float64(values: Any) -> Any:
    """The same nest of values with floating-point tensors in float64."""
    return pytree.tree_map(lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, values)


def as_double(values: Any) -> Any:
    """`to_float64` for the arguments of a call: the narrower types that it names become float64 too."""
    swap = lambda v: torch.float64 if v in _NARROW else v  # noqa: E731
    return to_float64(pytree.tree_map_only(torch.dtype, swap, values))
