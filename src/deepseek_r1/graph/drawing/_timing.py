"""Running a captured graph node by node, with the cost and the time of each. Every node is the eager operator."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from ...measure import OperatorCost, operator_cost


@dataclass
class Measurement:
    """What the runs told, by node id (that of a branch has the branch in front).

    Attributes:
        seconds: one entry for each round; of a node with branches, the time outside of them.
        calls: how often a node ran in one round.
        costs: of all calls together.
        shapes: shapes of a node's results.
        in_branches: seconds spent in branches so far, what reading the graph takes included.
    """

    seconds: list[dict[str, float]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    costs: dict[str, list[OperatorCost]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    in_branches: float = 0.0

    def of(self, ident: str) -> dict[str, Any]:
        """The fields of a drawn node; empty if it did not run."""
        if not self.calls.get(ident):
            return {}
        costs = self.costs[ident]
        flops = [c.flops for c in costs if c.flops is not None]
        return {
            "calls": self.calls[ident],
            "flops": sum(flops) if len(flops) == len(costs) else None,
            "read_bytes": sum(c.read_bytes for c in costs),
            "written_bytes": sum(c.written_bytes for c in costs),
            "time_ms": statistics.median(round_.get(ident, 0.0) for round_ in self.seconds) * 1e3,
        }


def measure(module: fx.GraphModule, leaves: list[Any], *, rounds: int, max_seconds: float) -> Measurement:
    """Run the graph once for its costs, which also warms it up, then `rounds` times for the time of each node.

    Stops after `max_seconds`, though never before three rounds. The module's buffers and the inputs are left as they
    were, also by a graph that writes to them.
    """
    found = Measurement()
    changes = _writes(module)
    kept = {name: t.clone() for name, t in module.named_buffers()} if changes else {}
    wait = _waiter([*leaves, *module.parameters(), *module.buffers()])
    start = time.perf_counter()
    # Under no_grad alone, operators of control flow would still ask autograd, which wants plain graphs as branches.
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        try:
            for number in range(rounds + 1):
                inputs = pytree.tree_map_only(torch.Tensor, torch.clone, leaves) if changes else leaves
                _Run(module, "", found, wait, counting=number == 0).run(*inputs, enable_io_processing=False)
                if number >= 3 and time.perf_counter() - start > max_seconds:
                    break
                for name, buffer in module.named_buffers() if changes else ():
                    buffer.copy_(kept[name])
        finally:
            for name, buffer in module.named_buffers() if changes else ():
                buffer.copy_(kept[name])
    return found


def _writes(module: fx.GraphModule) -> bool:
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    schemas = (getattr(n.target, "_schema", None) for graph in graphs for n in graph.nodes)
    return any(schema.is_mutable for schema in schemas if schema is not None)


def _waiter(values: list[Any]) -> Callable[[], None]:
    """Waits until the device has done its work; an operator on the CPU returns when it is done."""
    devices = {t.device for t in values if isinstance(t, torch.Tensor) and t.device.type not in ("cpu", "meta")}

    def wait() -> None:
        for device in devices:
            torch.accelerator.synchronize(device)

    return wait


class _Branch:
    """A branch of control flow that, when its operator calls it, runs node by node as the graph around it does."""

    def __init__(self, module: fx.GraphModule, run: _Run, prefix: str) -> None:
        self.module, self.outer, self.prefix = module, run, prefix

    def __call__(self, *args: Any) -> Any:
        outer, found = self.outer, self.outer.found
        start, deeper = time.perf_counter(), found.in_branches
        out = _Run(self.module, self.prefix, found, outer.wait, counting=outer.counting).run(*args)
        # Branches inside of this one are part of its time, so they are not added again.
        found.in_branches = deeper + time.perf_counter() - start
        return out


class _Run(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, prefix: str, found: Measurement, wait: Callable[[], None], *, counting: bool
    ) -> None:
        super().__init__(module)
        self.prefix, self.found, self.wait, self.counting = prefix, found, wait, counting
        if not prefix and not counting:
            found.seconds.append(defaultdict(float))

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self._timed(self.prefix + n.name, n.target, args, kwargs)
        value = super().run_node(n)
        return _Branch(value, self, f"{self.prefix}{n.target}/") if isinstance(value, fx.GraphModule) else value

    def _timed(self, ident: str, target: Any, args: Any, kwargs: Any) -> Any:
        if self.counting:
            out, cost = operator_cost(target, args, kwargs)
            if any(isinstance(a, _Branch) for a in args):  # what it costs is on the nodes of its branches
                cost = OperatorCost(flops=0, read_bytes=0, written_bytes=0)
            self.found.calls[ident] += 1
            self.found.costs[ident].append(cost)
            leaves = pytree.tree_leaves(out)
            self.found.shapes[ident] = [tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)]
            return out
        start, before = time.perf_counter(), self.found.in_branches
        out = target(*args, **kwargs)
        self.wait()
        spent = time.perf_counter() - start - (self.found.in_branches - before)
        self.found.seconds[-1][ident] += max(spent, 0.0)
        return out
