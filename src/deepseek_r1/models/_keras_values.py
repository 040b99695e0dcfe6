"""What flows between Keras layers once they are torch modules, and the tables of their translations.

A value is known in its own layout (Keras': channels last), with channels first, or both: convolutions and pools take
channels first, and one that follows another needs no permutation between them. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from ._keras_build import Builder

#: Class name of a Keras layer -> function(call) that gives its result.
LAYERS: dict[str, Callable[[Call], Any]] = {}
#: Class name of a keras.ops operation -> the same.
OPERATIONS: dict[str, Callable[[Call], Any]] = {}


class NoTranslationError(Exception):
    """A layer, or this form of it, has no plain torch module; the message says which part of it."""


def layer(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Decorator: the function translates Keras layers of these classes."""
    return lambda function: LAYERS.update(dict.fromkeys(names, function)) or function


def operation(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Decorator: the function translates keras.ops operations of these classes."""
    return lambda function: OPERATIONS.update(dict.fromkeys(names, function)) or function


@dataclass(kw_only=True)
class Value:
    """A tensor of the Keras graph; `own` and `first` are its nodes in Keras' layout and with channels in place 1.

    `origin` is the name of the graph's input where the values are exactly that input's; `mask` gives Keras' mask.
    """

    rank: int
    shape: tuple[int | None, ...]
    dtype: str
    own: fx.Node | None = None
    first: fx.Node | None = None
    origin: str = ""
    mask: Callable[[], Value | None] = lambda: None


@dataclass(frozen=True)
class First:
    """A result whose channels are in place 1."""

    node: fx.Node


def valued(result: Any, shape: tuple[int | None, ...], dtype: str = "float32") -> Value:
    """What a translation gave, as a value of that shape."""
    if isinstance(result, Value):
        result.rank, result.shape = len(shape), shape
        return result
    node = {"first": result.node} if isinstance(result, First) else {"own": result}
    return Value(rank=len(shape), shape=shape, dtype=dtype, **node)


class Call:
    """One call of a layer or an operation: its arguments, and the means to write its translation down."""

    def __init__(self, builder: Builder, op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.builder = builder
        self.op: Any = op
        self.name = name
        self.args = args
        self.kwargs = kwargs

    @property
    def x(self) -> Value:
        """The first argument, one tensor."""
        value = self.args[0] if self.args else next(iter(self.kwargs.values()))
        if not isinstance(value, Value):
            raise NoTranslationError("an input that is not one tensor")
        return value

    def given(self, name: str, place: int = 99) -> Any:
        """The argument of that name, or at that place; None where there is none."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    def mask(self, name: str = "mask", place: int = 99, of: Value | None = None) -> Any:
        """The mask that was given, else the one that Keras attached to a tensor."""
        given = self.given(name, place)
        return given if given is not None or of is None else of.mask()

    def module(self, make: Callable[[], nn.Module], *inputs: Any, suffix: str = "") -> fx.Node:
        """Call a module that belongs to the layer; it is made at the layer's first call."""
        path = self.builder.place(self.op, self.name, suffix, make)
        return self.builder.graph.call_module(path, tuple(self.builder.nodes(inputs)))

    def run(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> fx.Node:
        """Call a function; values among the inputs come in their own layout."""
        return self.builder.graph.call_function(function, self.builder.nodes(inputs), self.builder.nodes(options))

    def own(self, value: Value) -> fx.Node:
        """The value in Keras' layout."""
        if value.own is None:
            assert value.first is not None
            value.own = self.run(torch.permute, value.first, [0, *range(2, value.rank), 1])
        return value.own

    def first(self, value: Value) -> fx.Node:
        """The value with its last axis in place 1."""
        if value.first is None:
            value.first = self.run(torch.permute, value.own, [0, value.rank - 1, *range(1, value.rank - 1)])
        return value.first

    def image(self, value: Value) -> tuple[fx.Node, Callable[[fx.Node], Any], tuple[int | None, ...]]:
        """For layers with a data format: the value with channels first, the wrapper of results, the spatial sizes."""
        if self.op.data_format == "channels_first":
            return self.own(value), lambda node: node, value.shape[2:]
        return self.first(value), First, value.shape[1:-1]

    def pointwise(self, value: Value, function: Callable[..., Any], *more: Any, **options: Any) -> Any:
        """A function of each element alone, in whichever layout the value is at hand."""
        if value.own is None:
            return First(self.run(function, value.first, *more, **options))
        return self.run(function, value.own, *more, **options)

    def activated(self, result: Any, activation: Any) -> Any:
        """The result after a layer's activation: a function of keras.activations, or a layer."""
        if activation is None:
            return result
        value = valued(result, (None,) * self.x.rank)
        if hasattr(activation, "get_config"):
            return self.builder.translate(activation, f"{self.name}_activation", (value,), {})
        name = getattr(activation, "__name__", str(activation))
        if not getattr(activation, "__module__", "").startswith("keras.") or name not in ACTIVATIONS:
            raise NoTranslationError(f"the activation {name!r}")
        if name == "linear":
            return result
        if name in _ON_CHANNELS:
            return self.run(ACTIVATIONS[name], value)
        return self.pointwise(value, ACTIVATIONS[name])


def weight(variable: Any) -> Tensor:
    """A copy of a Keras variable, a backend's tensor or an array, on the CPU."""
    return torch.from_numpy(np.array(to_array(getattr(variable, "value", variable)), copy=True, order="C"))


def to_array(tensor: Any) -> np.ndarray[Any, Any]:
    """A tensor of any Keras backend as an array."""
    if isinstance(tensor, Tensor):
        return tensor.detach().cpu().numpy()
    return np.asarray(tensor)


def fill_(module: nn.Module, **weights: Tensor | None) -> nn.Module:
    """Changes `module`: its parameters and buffers take these values. None leaves one as it is, and untrained."""
    with torch.no_grad():
        for name, value in weights.items():
            target = getattr(module, name)
            if value is None:
                target.requires_grad_(False)
            else:
                target.data = value.reshape(target.shape).contiguous()
    return module


#: Functions of keras.activations with the same mathematics in torch.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "celu": F.celu, "elu": F.elu, "exponential": torch.exp, "gelu": F.gelu, "hard_shrink": F.hardshrink,
    "hard_sigmoid": F.hardsigmoid, "hard_silu": F.hardswish, "hard_tanh": F.hardtanh,
    "linear": torch.clone, "log_sigmoid": F.logsigmoid, "mish": F.mish, "relu": torch.relu, "relu6": F.relu6,
    "selu": torch.selu, "sigmoid": torch.sigmoid, "silu": F.silu, "soft_shrink": F.softshrink,
    "softplus": F.softplus, "softsign": F.softsign, "tanh": torch.tanh, "tanh_shrink": F.tanhshrink,
}  # fmt: skip


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, -1)


def _leaky_relu(x: Tensor) -> Tensor:
    # Keras' function has another slope than torch's.
    return F.leaky_relu(x, 0.2)


ACTIVATIONS |= {"softmax": _softmax, "log_softmax": _log_softmax, "leaky_relu": _leaky_relu}
#: These look along the last axis.
_ON_CHANNELS = ("softmax", "log_softmax")
