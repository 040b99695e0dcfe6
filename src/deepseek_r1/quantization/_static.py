"""Static int8 post-training quantisation of a captured Program, in the neutral form of docs/architecture.md.

Quantised are convolutions and linear layers with constant weights, and residual additions. Each of their inputs gets
an explicit quantize/dequantize pair, and so does their output after its activation function, so that engines can
fuse whole chains of integer kernels. Weights are stored as int8 with one dequantize node each.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, 2018.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from ..core import INT8_ACTIVATION, INT8_WEIGHT, ConfigError, InputError, Report, progress
from ..data import unpack_batch
from ..graph import PASSES, Program, rewrite, simplify
from ..graph.editing import add_constant, argument, constant_of, own_weights
from ._observe import Ranges, affine, quantize_weight
from ._rounding import observe_moments, round_weight

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed
_WEIGHTED = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.linear.default,
)  # fmt: skip
#: Operators with weights that stay float, and are said to.
_FLOAT = (
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.embedding.default,
    aten.bilinear.default, aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input,
)  # fmt: skip
_ADD = (aten.add.Tensor, aten.add_.Tensor)
#: Activation functions that engines fuse into the operator before them; the pair goes behind.
_FUSED = (
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default,
    aten.clamp.default, aten.clamp_min.default,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Int8StaticConfig:
    """Options of static int8 quantisation.

    Attributes:
        activation_clip: "minmax" or "mse" (the clipping limit with the smallest squared error).
        weight_clip: the same for each output channel of the weights.
        rounding: "nearest", or "compensated" (GPTQ and bias correction, see `_rounding`).
        calibration_batches: at most this many batches of the dataset are used.
        skip: parts of layer names (as in `named_modules`) that stay float.
    """

    activation_clip: str = "mse"
    weight_clip: str = "mse"
    rounding: str = "compensated"
    calibration_batches: int = 32
    skip: tuple[str, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        for name in ("activation_clip", "weight_clip"):
            if getattr(self, name) not in ("minmax", "mse"):
                raise ConfigError(f'Int8StaticConfig({name}={getattr(self, name)!r}): "minmax" or "mse" is needed.')
        if self.rounding not in ("nearest", "compensated"):
            raise ConfigError(f'Int8StaticConfig(rounding={self.rounding!r}): "nearest" or "compensated" is needed.')
        if self.calibration_batches < 1:
            raise ConfigError(
                f"Int8StaticConfig(calibration_batches={self.calibration_batches}): at least 1 is needed."
            )
        if isinstance(self.skip, str):
            raise ConfigError(f"Int8StaticConfig(skip={self.skip!r}): a tuple of names is needed: ({self.skip!r},).")


def quantize_static(program: Program, dataset: Iterable[Any], config: Int8StaticConfig) -> Program:
    """The int8 form of a float program, calibrated on `dataset`; `parent` of the result is the float program.

    Raises:
        InputError: the dataset is empty or does not fit, the program is quantised already, or nothing in it can be.
    """
    if program.precision != "fp32":
        way = "give its float parent" if program.precision == "int8" else "convert the model first: model.float()"
        raise InputError(f"the program is {program.precision} already, and int8 starts from fp32; {way}.")
    batches = calibration_inputs(program, dataset, config.calibration_batches)
    # Layers that were merged would share one range of activations, and lose accuracy.
    simple = simplify(program, [name for name in PASSES if name != "merge_linears"], strict=False)
    # A snapshot: training the module further must not change half of a quantised program (its biases).
    parent = rewrite(simple, own_weights, source=None)
    report = Report(f"quantise {program.name} to int8")
    parent_bytes = parent.parameters_bytes

    def change(module: GraphModule) -> None:
        plan = _plan(module, config, report)
        if not plan.layers:
            raise InputError(f"nothing in {program.name!r} can be quantised to int8: {dict(report.skipped)}")
        ranges = Ranges(module, plan.values)
        ranges.observe(batches, histogram=config.activation_clip == "mse")
        _store_weights(module, plan.layers, batches, config)
        for node in plan.values:
            _insert_pair(module, node, ranges, config, plan.consumers)
        report.add("layers in int8", len(plan.layers), before=0, how="convolutions and linear layers")
        report.add("additions in int8", plan.additions, before=0, how="residual additions")

    result = rewrite(parent, change, precision="int8", parent=parent, report=report)
    report.add("weights", result.parameters_bytes, before=parent_bytes, unit="bytes", how="all parameters and buffers")
    report.add("calibration samples", sum(_rows(b) for b in batches), how=f"{len(batches)} batches")
    report.add("output SQNR", _sqnr(parent, result, batches[:1]), unit="dB", how="against float, first batch")
    return result


def calibration_inputs(program: Program, dataset: Iterable[Any], limit: int) -> list[tuple[Any, ...]]:
    """Flat inputs of the first `limit` batches, checked against the program."""
    found: list[tuple[Any, ...]] = []
    for batch in progress.track(dataset, "calibration data", limit):
        args, kwargs, _ = unpack_batch(batch)
        if misfit := program.misfit(args, kwargs):
            raise InputError(f"calibration: {misfit}")
        found.append(tuple(pytree.tree_leaves((args, kwargs))))
        if len(found) >= limit:
            break
    if not found:
        raise InputError("calibration needs at least one batch; the dataset is empty.")
    return found


@dataclass
class _Plan:
    layers: list[Node]
    values: list[Node]
    consumers: set[Node]
    additions: int


def _plan(module: GraphModule, config: Int8StaticConfig, report: Report) -> _Plan:
    layers, values, consumers = [], dict[Node, None](), set[Node]()
    additions = 0
    for node in module.graph.nodes:
        if node.target in _WEIGHTED:
            reason = _why_not(module, node, config)
            if reason:
                report.skip(_layer_name(node), reason)
                continue
            layers.append(node)
            inputs = [node.args[0]]
        elif node.target in _ADD and _is_residual(node):
            inputs = list(node.args[:2])
            additions += 1
        else:
            if node.target in _FLOAT:
                report.skip(_layer_name(node), f"no int8 form for {node.target}")
            continue
        consumers.add(node)
        for value in (*inputs, _output_of(node)):
            if isinstance(value, Node) and _is_float(value) and not _is_output(value):
                values[value] = None
    return _Plan(layers, list(values), consumers, additions)


def _why_not(module: GraphModule, node: Node, config: Int8StaticConfig) -> str:
    name = _layer_name(node)
    if any(part in name for part in config.skip):
        return "in the skip list"
    weight = constant_of(module, argument(node, 1))
    if weight is None:
        return "its weight is not a constant"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}"
    if not torch.isfinite(weight).all():
        raise InputError(f"the weight of {name!r} has values that are not finite.")
    return ""


def _layer_name(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    return str(path).removeprefix("L['self'].") or node.name


def _is_residual(node: Node) -> bool:
    """Whether a node adds two computed float tensors of the same shape."""
    a, b = argument(node, 0), argument(node, 1)
    if not (isinstance(a, Node) and isinstance(b, Node) and a.op == b.op == "call_function" and _is_float(node)):
        return False
    return _is_float(a) and _is_float(b) and a.meta["val"].shape == b.meta["val"].shape and a.meta["val"].ndim >= 3


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _output_of(node: Node) -> Node:
    """The node itself, or the activation function that is its only user."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _FUSED:
        return users[0]
    return node


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _store_weights(
    module: GraphModule, layers: list[Node], batches: list[tuple[Any, ...]], config: Int8StaticConfig
) -> None:
    weights: dict[Node, torch.Tensor] = {}
    for node in layers:
        weight = constant_of(module, node.args[1])
        assert weight is not None, f"{node} was planned although its weight is no constant"
        weights[node] = weight
    moments = observe_moments(module, weights, batches) if config.rounding == "compensated" else {}
    done: dict[Any, tuple[Node, Node, Node]] = {}
    for number, (node, weight) in enumerate(weights.items()):
        source = node.args[1]
        assert isinstance(source, Node), "a constant weight is a node"
        if source.target not in done:
            # A weight that two layers share is rounded for the first of them, and corrects no bias.
            shared = sum(other.args[1] is source for other in layers) > 1
            values, scales = quantize_weight(weight, INT8_WEIGHT, config.weight_clip)
            if node in moments and not shared:
                values, missing = round_weight(weight, scales, moments[node], INT8_WEIGHT)
                _correct_bias(module, node, missing, number)
            zeros = torch.zeros(len(scales), dtype=torch.int8, device=scales.device)
            first = next(n for n in module.graph.nodes if n.op == "call_function")
            done[source.target] = (
                add_constant(module, first, values, f"q{number}_weight"),
                add_constant(module, first, scales, f"q{number}_scale"),
                add_constant(module, first, zeros, f"q{number}_zero"),
            )
        low, high = INT8_WEIGHT.range
        with module.graph.inserting_before(node):
            arguments = (*done[source.target], 0, low, high, torch.int8)
            back = module.graph.call_function(_q.dequantize_per_channel.default, arguments)
        node.replace_input_with(source, back)


def _correct_bias(module: GraphModule, node: Node, missing: torch.Tensor, number: int) -> None:
    old = constant_of(module, argument(node, 2))
    if old is None and argument(node, 2) is not None:
        return
    bias = missing.float() if old is None else (old.detach().double() + missing).float()
    new = add_constant(module, node, bias, f"q{number}_bias")
    node.args = (*node.args[:2], new, *node.args[3:])


def _insert_pair(
    module: GraphModule, node: Node, ranges: Ranges, config: Int8StaticConfig, consumers: set[Node]
) -> None:
    if node not in ranges.low:
        raise InputError("calibration saw no values; the batches are empty.")
    low, high = ranges.limits(node, INT8_ACTIVATION, config.activation_clip)
    scale, zero = affine(low, high, INT8_ACTIVATION)
    limits = (scale, zero, *INT8_ACTIVATION.range, torch.int8)
    users = list(node.users)
    # One pair for each consumer: engines match a pair with the operator behind it, and share the integer tensor.
    with module.graph.inserting_after(node):
        stored = module.graph.call_function(_q.quantize_per_tensor.default, (node, *limits))
    anchor = stored
    for user in users:
        with module.graph.inserting_after(anchor):
            anchor = module.graph.call_function(_q.dequantize_per_tensor.default, (stored, *limits))
        user.replace_input_with(node, anchor)


def _rows(inputs: tuple[Any, ...]) -> int:
    first = next((v for v in inputs if isinstance(v, torch.Tensor) and v.ndim), None)
    return 1 if first is None else int(first.shape[0])


def _sqnr(parent: Program, result: Program, batches: list[tuple[Any, ...]]) -> float:
    signal = noise = 0.0
    _, tree = pytree.tree_flatten(parent.example_inputs)
    for leaves in batches:
        args, kwargs = pytree.tree_unflatten(list(leaves), tree)
        with torch.no_grad():
            pairs = zip(pytree.tree_leaves(parent(*args, **kwargs)), pytree.tree_leaves(result(*args, **kwargs)))
            for a, b in pairs:
                if isinstance(a, torch.Tensor) and a.is_floating_point():
                    signal += float((a.double() ** 2).sum())
                    noise += float(((a.double() - b.double()) ** 2).sum())
    return 10 * float(torch.log10(torch.tensor(signal / noise))) if noise else float("inf")
