"""Graphs run in float64, and compared: the judge of what a pass did to a program's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Interpreter

from ..program import as_double, float64_copy


class Judge:
    """Runs graphs on the same inputs: in float64, or as they are where an operator has no float64 form.

    Attributes:
        why_not: why float64 was not possible; empty if it was.
    """

    def __init__(self, module: GraphModule, leaves: Sequence[Any]) -> None:
        self._leaves = leaves
        self._constants: dict[int, tuple[Any, Any]] = {}
        self.why_not = ""
        try:
            self.last = self.run(module)
        except Exception as e:  # an operator may refuse float64 in any way
            self.why_not = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
            self._constants.clear()
            self.last = self.run(module)

    def run(self, module: GraphModule) -> dict[str, Any]:
        """All that can be seen from outside: outputs, and the inputs and buffers that were written to."""
        inputs = [self._copy(v) for v in self._leaves]
        # Random numbers are the same for every graph, and the user's own are left alone.
        with torch.random.fork_rng(), torch.inference_mode(False), torch.no_grad():
            torch.manual_seed(0)
            run = _Run(module, self)
            outputs = run.run(*inputs, enable_io_processing=False)
        seen = {f"output {i}": v for i, v in enumerate(pytree.tree_leaves(outputs))}
        seen |= {f"input {i}": v for i, v in enumerate(inputs) if isinstance(v, torch.Tensor) and v._version}
        for name, tensor in run.fetched.items():
            if tensor._version:
                seen[f"buffer {name}"] = tensor
        # What was written to is of no use to the next graph.
        written = {id(tensor) for tensor in run.fetched.values() if tensor._version}
        self._constants = {k: pair for k, pair in self._constants.items() if id(pair[1]) not in written}
        return seen

    def change(self, module: GraphModule) -> float:
        """Largest relative change since the graph that was accepted last; infinite if something was lost."""
        self._pending = self.run(module)
        if list(self._pending) != list(self.last):
            return float("inf")
        return max((difference(self.last[k], self._pending[k]) for k in self.last), default=0.0)

    def accept(self) -> None:
        """What `change` was asked about last becomes what the next graph is compared with."""
        self.last = self._pending

    def constant(self, value: Any) -> Any:
        """A constant of the graph as this judge computes with it; converted once for all runs."""
        if id(value) not in self._constants:
            if isinstance(value, GraphModule):
                copy = value if self.why_not else float64_copy(value)
            else:
                copy = self._copy(value)
            self._constants[id(value)] = (value, copy)
        return self._constants[id(value)][1]

    def arguments(self, values: Any) -> Any:
        """Arguments of a call as this judge computes with them."""
        return values if self.why_not else as_double(values)

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with torch.inference_mode(False), torch.no_grad():
            # A copy of what was made in inference mode counts as written to; `data` begins to count anew.
            copied = value.detach().clone().data
            return copied.double() if value.is_floating_point() and not self.why_not else copied


class _Run(Interpreter):
    def __init__(self, module: GraphModule, judge: Judge) -> None:
        super().__init__(module)
        self._judge = judge
        self.fetched: dict[str, torch.Tensor] = {}

    def fetch_attr(self, target: str) -> Any:
        value = self._judge.constant(super().fetch_attr(target))
        if isinstance(value, torch.Tensor):
            self.fetched[target] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._judge.arguments((args, kwargs))
        return super().call_function(target, args, kwargs)


def difference(before: Any, after: Any) -> float:
    """Largest absolute difference over the largest absolute value; infinite for another shape, dtype, NaN or number.

    Example:
        >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        0.25
    """
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return 0.0 if type(before) is type(after) and before == after else float("inf")
    if before.shape != after.shape or before.dtype != after.dtype:
        return float("inf")
    if before.is_complex():
        before, after = torch.view_as_real(before), torch.view_as_real(after)
    if not before.is_floating_point():
        return 0.0 if torch.equal(before, after) else float("inf")
    before, after = before.double(), after.double()
    finite = before.isfinite()
    # Infinities and NaN must be in the same places.
    strange = [v.where(~v.isfinite(), 0.0).nan_to_num(nan=1.0) for v in (before, after)]
    if not torch.equal(*strange):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(before[finite].abs().max())
    return float((before - after)[finite].abs().max()) / max(largest, 1e-12)
