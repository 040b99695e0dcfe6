"""What each layer takes in each format on one engine, where it stands in the model, and what neighbours pay to differ.

For each format the whole model is compiled with all layers in it, timed in turns with the others, and profiled. So a
layer is timed with its real neighbours, fused as it will be, and with the caches as the rest of the model leaves them.
Knows no accuracy.

Source of the idea to time layers inside their sequence: Intel's mixed precision with time measured on Gaudi 2,
arXiv 2505.13060, 2025.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Interpreter, Node

from ..core import Float32, Int8Static, LayerFormat, progress
from ..engines import OperatorTime, Runner
from ..measure import paired_latency, ratio_interval
from ._compiled import Compiler, Form
from ._layers import Layer
from ._observe import watch
from ._static import output_of
from ._workshop import Choice, Workshop

aten = torch.ops.aten
FLOAT = str(Float32())
#: Operators behind which a value of an integer layer may stay an integer.
_TRANSPARENT = (
    aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.clamp.default, aten.clamp_min.default, aten.max_pool2d.default, aten.max_pool1d.default, aten.pad.default,
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.dropout.default,
)  # fmt: skip
_ADD = (aten.add.Tensor, aten.add_.Tensor)
#: Conversions belong to the layer behind them, or to the one before.
_FOR_THE_NEXT = ("QuantizeLinear", "DynamicQuantizeLinear")
_FOR_THE_LAST = ("DequantizeLinear",)
#: Milliseconds of a conversion where none was seen: once, and for each number.
_CONVERSION = (4e-3, 3e-7)
#: How often a profiled model runs at least, and at most.
_PROFILED_RUNS = (10, 25)
_ALTERNATING = "alternating"
#: By which factor a total may correct the profile of its layers.
_MOST = 2.0


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Two layers of which the second reads what the first gives.

    Attributes:
        first, second: names of layers.
        store_ms: of making the value an integer, where only the second wants one.
        read_ms: of making it a float again, where only the first gives an integer.
    """

    first: str
    second: str
    store_ms: float
    read_ms: float

    def ms(self, first: LayerFormat, second: LayerFormat) -> float:
        """What their difference costs."""
        gives, wants = first.activation == "static", second.activation == "static"
        return 0.0 if gives == wants else (self.read_ms if gives else self.store_ms)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Milliseconds by layer and format; what a model takes is their sum.

    Attributes:
        engine: that they were measured on.
        base_ms: what is not part of any layer that can be chosen for.
        layers: name of layer -> name of format -> ms.
        neighbours: pairs of layers that pay for being different.
        uniform: name of format -> measured ms of the model with all layers in it.
        how: how the share of each layer was found.
        refused: name of format -> why the engine cannot run it.
    """

    engine: str
    base_ms: float
    layers: dict[str, dict[str, float]]
    neighbours: list[Neighbours] = field(default_factory=list)
    uniform: dict[str, float] = field(default_factory=dict)
    how: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    def predict(self, choice: Choice) -> float:
        """Milliseconds of the model with a choice of formats."""
        layers = sum(row[str(choice[name])] for name, row in self.layers.items())
        return self.base_ms + layers + sum(n.ms(choice[n.first], choice[n.second]) for n in self.neighbours)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """What `to_dict` gave."""
        return cls(**{**values, "neighbours": [Neighbours(**n) for n in values["neighbours"]]})


def measure_table(
    shop: Workshop, compiler: Compiler, formats: Iterable[LayerFormat], fixed: Choice, leaves: Sequence[Any],
    *, seconds: float = 20.0,
) -> LatencyTable:  # fmt: skip
    """Measure a table on this machine.

    Args:
        compiler: keeps the forms that are timed, those with one format for all layers.
        formats: those that are asked about; float32 always is.
        fixed: layers whose format is not asked about.
        leaves: flat inputs of the call that is timed.
        seconds: for timing, once everything is compiled.
    """
    choices: dict[str, Choice] = {FLOAT: shop.uniform(Float32(), fixed)}
    for fmt in formats:
        choice = shop.uniform(fmt, fixed)
        if choice not in choices.values():
            choices[str(fmt)] = choice
    if str(Int8Static()) in choices:
        choices[_ALTERNATING] = _alternating(choices[FLOAT], choices[str(Int8Static())])
    refused: dict[str, str] = {}
    forms: dict[str, Form] = {}
    for name in progress.track(list(choices), f"compiling for {compiler.engine}", len(choices)):
        form = compiler.choice(choices[name], keep=name != _ALTERNATING)
        if form.refused:
            refused[name] = form.refused
        else:
            forms[name] = form
    if FLOAT not in forms:
        return LatencyTable(engine=compiler.engine, base_ms=0.0, layers={}, refused=refused)
    profiles = _profiles(forms, leaves, seconds)
    totals = _totals({name: form.open() for name, form in forms.items()}, leaves, seconds)
    sizes, mixed, mixed_ms = _sizes(shop, leaves), profiles.pop(_ALTERNATING, []), totals.pop(_ALTERNATING, None)
    refused.pop(_ALTERNATING, None)
    shares = _Shares(shop, leaves, fixed)
    base, layers = shares.split(profiles, totals, {name: choices[name] for name in totals})
    table = LatencyTable(
        engine=compiler.engine, base_ms=base, layers=layers, uniform=totals, how=shares.how, refused=refused,
        neighbours=_neighbours(shop, sizes, mixed),
    )  # fmt: skip
    table = _fitted(table, choices)
    return table if mixed_ms is None else _with_conversions(table, choices[_ALTERNATING], mixed_ms)


def _alternating(plain: Choice, static: Choice) -> Choice:
    """Every second layer in static int8, so that there are conversions of all sizes."""
    return {name: (static if number % 2 else plain)[name] for number, name in enumerate(plain)}


def _with_conversions(table: LatencyTable, choice: Choice, total_ms: float) -> LatencyTable:
    """The table with what neighbours pay scaled to what a model of alternating formats took."""
    paid = sum(n.ms(choice[n.first], choice[n.second]) for n in table.neighbours)
    if paid <= 0:
        return table
    factor = min(max((total_ms - table.predict(choice) + paid) / paid, 0.0), _MOST)
    scaled = [replace(n, store_ms=n.store_ms * factor, read_ms=n.read_ms * factor) for n in table.neighbours]
    return replace(table, neighbours=scaled)


def _profiles(forms: Mapping[str, Form], leaves: Sequence[Any], seconds: float) -> dict[str, list[OperatorTime]]:
    opened = {name: form.profile() for name, form in forms.items()}
    running = {name: profile for name, profile in opened.items() if profile is not None}
    begin = time.perf_counter()
    with torch.no_grad():
        # In turns, so that what disturbs one disturbs all.
        for number in range(_PROFILED_RUNS[1] if running else 0):
            for profile in running.values():
                profile(leaves)
            if number >= _PROFILED_RUNS[0] and time.perf_counter() - begin > seconds:
                break
    return {name: profile.finish() for name, profile in running.items()}


def _totals(runners: Mapping[str, Runner], leaves: Sequence[Any], seconds: float) -> dict[str, float]:
    def call(runner: Runner) -> Any:
        return lambda: runner(leaves)

    with torch.no_grad():
        times = paired_latency({n: call(r) for n, r in runners.items()}, rounds=40, max_seconds=seconds)
    # In units of float32's latency of the same round, so that what disturbs one disturbs both.
    plain = times[FLOAT]
    return {n: plain.median_ms / ratio_interval(plain, latency)[1] for n, latency in times.items()}


def _sizes(shop: Workshop, leaves: Sequence[Any]) -> dict[Node, int]:
    """Numbers in what each layer reads, and in what stands behind it, for these inputs."""
    found: dict[Node, int] = {}
    nodes = [n for layer in shop.layers for n in layer.nodes]
    watched = [v for n in nodes for v in (n, output_of(n), n.args[0]) if isinstance(v, Node)]
    watch(shop.module, watched, [tuple(leaves)], lambda node, value: found.update({node: value.numel()}))
    return found


class _Shares:
    """Splits the time of a whole model among its layers."""

    def __init__(self, shop: Workshop, leaves: Sequence[Any], fixed: Choice) -> None:
        self._shop, self._leaves = shop, leaves
        self._free = [layer.name for layer in shop.layers if layer.name not in fixed]
        order = {node: i for i, node in enumerate(shop.module.graph.nodes)}
        calls = [(order[node], layer) for layer in shop.layers for node in layer.nodes]
        self._calls = [layer for _, layer in sorted(calls, key=lambda c: c[0])]
        self.how = ""

    def split(
        self, profiles: Mapping[str, list[OperatorTime]], totals: Mapping[str, float], choices: Mapping[str, Choice]
    ) -> tuple[float, dict[str, dict[str, float]]]:
        """What is no free layer's in the float model, and by layer and format what the layer's operators take."""
        found = {name: self._profiled(profiles[name]) for name in totals if name in profiles}
        # What watching costs is taken to fall on all operators alike.
        pace = {name: totals[name] / _sum(profiles[name]) for name in found}
        parts = {
            name: {n: ms * pace[name] for n, ms in part.items()} for name, part in found.items() if part is not None
        }
        if len(parts) < len(totals):
            self.how = "the model timed in each format, shared out as PyTorch's operators take their time"
            share, parts = self._by_eager(), {}
            base = (1 - sum(share.values())) * min(totals.values())
        else:
            self.how = "the model timed in each format, shared out by the engine's profile"
            share = {}
            base = max(totals[FLOAT] - sum(parts[FLOAT][n] for n in self._free), 0.0)
        layers: dict[str, dict[str, float]] = {name: {} for name in self._free}
        for name in totals:
            for n in self._free:
                if str(choices[name][n]) == name:
                    layers[n][name] = parts[name][n] if name in parts else share[n] * totals[name]
        return base, layers

    def _profiled(self, operators: Sequence[OperatorTime]) -> dict[str, float] | None:
        """Layer -> ms of its operators with the conversions around them; None if they cannot be told apart."""
        waiting, stored = list(self._calls), list(self._calls)
        found: dict[str, float] = {layer.name: 0.0 for layer in self._shop.layers}
        owners: list[str | None] = []
        for operator in operators:
            # What makes floats of a stored weight may run long before the layer.
            those = stored if operator.kind in _FOR_THE_LAST else waiting
            layer = next((c for c in those if operator.weight and c.weight.numel() == operator.weight), None)
            if layer is not None:
                those.remove(layer)
            owners.append(layer.name if layer else None)
        # Some kernels are stored with their channels filled up; their order tells which they are.
        nameless = [i for i, o in enumerate(operators) if o.weight and not owners[i] and o.kind not in _FOR_THE_LAST]
        if len(nameless) == len(waiting):
            for i, layer in zip(nameless, waiting):
                owners[i] = layer.name
            waiting = []
        if len(waiting) > 0.1 * len(self._calls):
            return None
        last = None
        pending = 0.0
        for operator, owner in zip(operators, owners):
            if owner is not None and operator.kind in _FOR_THE_LAST:
                found[owner] += operator.ms
            elif owner is not None:
                found[owner] += operator.ms + pending
                last, pending = owner, 0.0
            elif operator.kind in _FOR_THE_NEXT:
                pending += operator.ms
            elif operator.kind in _FOR_THE_LAST and last is not None:
                found[last] += operator.ms
        return found

    def _by_eager(self) -> dict[str, float]:
        clock = _Clock(self._shop.module)
        with torch.no_grad():
            for _ in range(5):
                clock.run(*self._leaves)
        spent = {n: min(times) for n, times in clock.spent.items()}
        everything = sum(spent.values())
        return {name: sum(spent[n] for n in self._shop.layer(name).nodes) / everything for name in self._free}


class _Clock(Interpreter):
    """Seconds of each operator."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.spent: dict[Node, list[float]] = {}

    def run_node(self, n: Node) -> Any:
        begin = time.perf_counter()
        value = super().run_node(n)
        self.spent.setdefault(n, []).append(time.perf_counter() - begin)
        return value


def _sum(operators: Iterable[OperatorTime]) -> float:
    return max(sum(operator.ms for operator in operators), 1e-9)


def _neighbours(shop: Workshop, sizes: Mapping[Node, int], operators: Sequence[OperatorTime]) -> list[Neighbours]:
    owners = {output_of(node): layer for layer in shop.layers for node in layer.nodes}
    store = _line([o for o in operators if o.kind == "QuantizeLinear"], _CONVERSION)
    read = _line([o for o in operators if o.kind == "DequantizeLinear" and not o.weight], _CONVERSION)
    # Integer convolutions want channels last: images are turned on the way in and out.
    turn = _line([o for o in operators if o.kind == "Transpose"], _CONVERSION)
    found: dict[tuple[str, str], Neighbours] = {}
    for layer in shop.layers:
        for node in layer.nodes:
            for value in _producers(node.args[0], owners):
                pair = (owners[value].name, layer.name)
                size = sizes.get(value, 0)
                if pair[0] != pair[1] and pair not in found:
                    turned = turn[0] + turn[1] * size if value.meta["val"].ndim == 4 else 0.0
                    found[pair] = Neighbours(
                        first=pair[0], second=pair[1],
                        store_ms=store[0] + store[1] * size + turned, read_ms=read[0] + read[1] * size + turned,
                    )  # fmt: skip
    return list(found.values())


def _producers(value: Any, owners: Mapping[Node, Layer], additions: int = 1) -> list[Node]:
    """The layers' outputs that a value is, with at most one residual addition and nothing that computes between."""
    if not isinstance(value, Node):
        return []
    if value in owners:
        return [value]
    if value.target in _TRANSPARENT and value.args:
        return _producers(value.args[0], owners, additions)
    if value.target in _ADD and additions:
        return [p for part in value.args[:2] for p in _producers(part, owners, additions - 1)]
    return []


def _line(operators: Sequence[OperatorTime], otherwise: tuple[float, float]) -> tuple[float, float]:
    """Milliseconds once, and for each number; `otherwise` if too few operators tell."""
    sizes = np.array([o.elements for o in operators], float)
    if len(set(sizes.tolist())) < 3:
        return otherwise
    slope, start = np.polyfit(sizes, np.array([o.ms for o in operators]), 1)
    return max(float(start), 0.0), max(float(slope), 0.0)


def _fitted(table: LatencyTable, choices: Mapping[str, Choice]) -> LatencyTable:
    """The table with the layers of each format scaled to what its model took, conversions included.

    So what else differs from float (functions that are fused no longer, say) is shared out among them as well. Where
    few layers change, the difference of two totals is mostly noise, and may not say more than it can know.
    """
    layers = {name: dict(row) for name, row in table.layers.items()}
    for name, total in sorted(table.uniform.items(), key=lambda item: item[0] != FLOAT):
        choice = choices[name]
        mine = [n for n in layers if str(choice[n]) == name]
        others = sum(row[FLOAT] for n, row in layers.items() if n not in mine)
        paid = sum(n.ms(choice[n.first], choice[n.second]) for n in table.neighbours)
        spent = sum(layers[n][name] for n in mine)
        if spent > 0:
            factor = (total - table.base_ms - others - paid) / spent
            for n in mine:
                layers[n][name] *= min(max(factor, 1 / _MOST), _MOST)
    return replace(table, layers=layers)
