"""From a quantised program to a command stream. One pass over the graph; what has no command is refused by name.

A command reads and writes 8-bit buffers. So the graph must quantise the result of each operator, after its ReLU if
it has one; only results of the program may stay wide.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import GraphModule, Node

from deepseek_r1.graph import Program

aten, _q = torch.ops.aten, torch.ops.quantized_decomposed

#: Bits of the multiplier that scales an accumulator back.
MULTIPLIER_BITS = 15


class Refused(Exception):
    """The program needs something that the accelerator does not have."""


@dataclass(frozen=True)
class Stored:
    """An 8-bit buffer: real = scale * (stored - zero)."""

    buffer: int
    scale: float
    zero: int


@dataclass(frozen=True)
class Pending:
    """A command that waits to learn in which scale its result is stored."""

    command: dict[str, Any]
    scale: Any
    relu: bool = False


@dataclass
class Compiler:
    """The state of one pass: what is known about each node so far."""

    module: GraphModule
    stream: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    known: dict[Node, Any] = field(default_factory=dict)
    buffers: int = 0

    def buffer(self) -> int:
        """The number of a new buffer."""
        self.buffers += 1
        return self.buffers - 1

    def emit(self, pending: Pending, out: Stored) -> None:
        """Write a command whose result goes to `out`."""
        factors = np.atleast_1d(np.asarray(pending.scale, dtype=np.float64)) / out.scale
        multipliers, shifts = zip(*(fixed_point(float(f)) for f in factors))
        low = out.zero if pending.relu else -128
        rescale = {"multiplier": multipliers, "shift": shifts, "zero": out.zero, "low": max(low, -128)}
        self.stream.append({**pending.command, "out": out.buffer, "rescale": rescale})


def compile_commands(program: Program) -> tuple[dict[str, Any], dict[str, Any]]:
    """The command stream (plain values) and the weight memory (arrays).

    Raises:
        Refused: with the reason.
    """
    if program.precision != "int8":
        raise Refused(f"it computes in 8-bit integers, and the program is {program.precision}: quantise it first")
    for name, shape in zip(program.input_names(), program.input_shapes(), strict=True):
        if not shape or not isinstance(shape[0], str) or any(isinstance(d, str) for d in shape[1:]):
            raise Refused(f"it takes fixed sizes behind a free batch, and input {name} has {list(shape)}")
    state = Compiler(program.module())
    inputs: list[Node] = []
    outputs: list[dict[str, Any]] = []
    for node in state.module.graph.nodes:
        if node.op == "placeholder":
            state.known[node] = len(inputs)
            inputs.append(node)
        elif node.op == "get_attr":
            state.known[node] = operator.attrgetter(str(node.target))(state.module)
        elif node.op == "output":
            outputs = [_output(state, value) for value in _flat(node.args[0])]
        elif node.target in _COMMANDS:
            state.known[node] = _COMMANDS[node.target](state, node)
        else:
            raise Refused(f"it has no command for {node.target}")
    return {"stream": state.stream, "outputs": outputs, "buffers": state.buffers}, state.memory


def fixed_point(factor: float) -> tuple[int, int]:
    """(multiplier, shift) with factor = multiplier / 2 ** shift, to 15 bits."""
    part, exponent = math.frexp(factor)
    multiplier, shift = round(part * 2**MULTIPLIER_BITS), MULTIPLIER_BITS - exponent
    if not 1 <= shift <= 46:
        raise Refused(f"a result would have to be scaled by {factor:.1e}, which its multiplier cannot")
    return multiplier, shift


def _flat(value: Any) -> list[Any]:
    return [v for part in value for v in _flat(part)] if isinstance(value, list | tuple) else [value]


def _output(state: Compiler, value: Any) -> dict[str, Any]:
    found = state.known.get(value)
    if not isinstance(found, Pending | Stored):
        raise Refused("an output of the program is not computed")
    shape = [int(d) for d in value.meta["val"].shape[1:]]
    if isinstance(found, Stored):
        return {"buffer": found.buffer, "scale": found.scale, "zero": found.zero, "shape": shape}
    # The accumulators themselves are read out and scaled by the host.
    state.stream.append({**found.command, "out": (buffer := state.buffer())})
    scale = np.asarray(found.scale, dtype=np.float64).tolist()
    return {"buffer": buffer, "scale": scale, "zero": 0, "shape": shape, "relu": found.relu}


def _stored(state: Compiler, node: Any, user: Node) -> Stored:
    found = state.known.get(node)
    if not isinstance(found, Stored):
        raise Refused(f"an input of {user.name} is not quantised")
    return found


def _quantize(state: Compiler, node: Node) -> Stored:
    value, scale, zero, low, high, dtype = node.args[:6]
    if dtype is not torch.int8 or (low, high) != (-128, 127):
        raise Refused(f"it stores -128 to 127, and {node.name} asks for {low} to {high}")
    out, found = Stored(state.buffer(), float(scale), int(zero)), state.known[value]
    if isinstance(found, Pending):
        state.emit(found, out)
    elif isinstance(found, int):
        state.stream.append(
            {"command": "load", "input": found, "out": out.buffer, "scale": out.scale, "zero": out.zero}
        )
    else:
        raise Refused(f"{node.name} stores an 8-bit buffer again in another scale")
    return out


def _dequantize(state: Compiler, node: Node) -> Stored:
    return _stored(state, node.args[0], node)


def _weights(state: Compiler, node: Node) -> tuple[Any, Any]:
    values, scales, zeros, axis = (state.known.get(a, a) for a in node.args[:4])
    if axis != 0 or (zeros is not None and bool(zeros.any())):
        raise Refused("it takes symmetric weights with one scale for each output channel")
    return values.numpy(), scales.numpy().astype(np.float64)


def _with_weights(state: Compiler, node: Node, command: dict[str, Any]) -> Pending:
    source = _stored(state, node.args[0], node)
    found = state.known.get(node.args[1])
    if not isinstance(found, tuple):
        raise Refused(f"the weight of {node.name} is not quantised")
    weight, scales = found
    scale, name = scales * source.scale, node.name
    bias = state.known.get(node.args[2]) if len(node.args) > 2 else None
    biases = np.zeros(len(scale)) if bias is None else bias.detach().numpy().astype(np.float64)
    state.memory[f"{name}.weight"] = weight
    state.memory[f"{name}.bias"] = np.round(biases / scale).astype(np.int32)
    return Pending({**command, "in": source.buffer, "zero_in": source.zero, "memory": name}, scale)


def _conv(state: Compiler, node: Node) -> Pending:
    stride, padding, dilation, groups = (*node.args[3:], *([[1, 1], [0, 0], [1, 1], 1][len(node.args[3:]) :]))
    if groups != 1 or list(dilation) != [1, 1]:
        raise Refused(f"its convolution has no groups and no dilation, and {node.name} has {groups} and {dilation}")
    return _with_weights(state, node, {"command": "conv", "stride": list(stride), "padding": list(padding)})


def _linear(state: Compiler, node: Node) -> Pending:
    if node.meta["val"].ndim != 2:
        raise Refused(f"its product takes rows of numbers, and {node.name} gives {node.meta['val'].ndim} dimensions")
    return _with_weights(state, node, {"command": "product"})


def _add(state: Compiler, node: Node) -> Pending:
    a, b = (_stored(state, v, node) for v in node.args[:2])
    if node.kwargs or len({tuple(map(str, v.meta["val"].shape)) for v in node.all_input_nodes}) != 1:
        raise Refused(f"it adds values of one shape, and {node.name} does not")
    # Both are brought to a 4096th of the larger scale, in which they are added.
    common = max(a.scale, b.scale) / 4096
    factors = [round(v.scale / common) for v in (a, b)]
    return Pending({"command": "add", "in": [a.buffer, b.buffer], "zero_in": [a.zero, b.zero], "by": factors}, common)


def _mean(state: Compiler, node: Node) -> Pending:
    source, value = _stored(state, node.args[0], node), node.args[0].meta["val"]
    if sorted(d % value.ndim for d in node.args[1]) != [2, 3] or value.ndim != 4:
        raise Refused(f"its mean is over height and width, and that of {node.name} is over {node.args[1]}")
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    scale = source.scale / (int(value.shape[2]) * int(value.shape[3]))
    return Pending({"command": "sum", "in": source.buffer, "zero_in": source.zero, "keep": keep}, scale)


def _relu(state: Compiler, node: Node) -> Pending:
    found = state.known.get(node.args[0])
    if not isinstance(found, Pending) or len(node.args[0].users) != 1:
        raise Refused(f"it has a ReLU only behind another command, and {node.name} stands alone")
    return Pending(found.command, found.scale, relu=True)


_COMMANDS = {
    _q.quantize_per_tensor.default: _quantize,
    _q.dequantize_per_tensor.default: _dequantize,
    _q.dequantize_per_channel.default: _weights,
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten.add.Tensor: _add,
    aten.mean.dim: _mean,
    aten.relu.default: _relu,
}
