"""A Keras model as a torch.fx.GraphModule: plain torch modules under the layers' names, in the order of the graph.

What has no plain form stays a Keras layer inside, and is listed. Works with any Keras backend, because it reads
configurations and arrays only. Knows nothing about files, and does not check results.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..core import InputError, UnsupportedOpError
from . import _keras_activations, _keras_conv, _keras_layers, _keras_operations, _keras_sequences
from ._keras_modules import KerasLayer
from ._keras_values import LAYERS, OPERATIONS, Call, NoTranslationError, Value, valued, weight
from ._onnx_build import attribute_path, torch_name

#: Importing these modules fills LAYERS and OPERATIONS.
_TABLES = (_keras_activations, _keras_conv, _keras_layers, _keras_operations, _keras_sequences)


def build(keras: Any, model: Any) -> fx.GraphModule:
    """The module that computes what the Keras model does.

    `meta` holds "kept" (name -> why a layer stayed one of Keras), "notes", "frozen" (names of layers that Keras does
    not train) and "bounds" (input -> how many indices it may take).

    Raises:
        UnsupportedOpError: a layer would have to stay one of Keras, whose backend is not torch.
        InputError: a layer computes in a precision other than float32 or float64.
    """
    return Builder(keras).module(model)


def build_whole(keras: Any, model: Any, inputs: int) -> fx.GraphModule:
    """A module around a Keras model whose inside cannot be read.

    Raises:
        UnsupportedOpError: Keras does not run on torch.
    """
    builder = Builder(keras)
    why = "its own call, or not built"
    nodes = [builder.graph.placeholder(f"input_{i}") for i in range(inputs)]
    builder.graph.output(builder.keep(model, "model", tuple(nodes), {}, 1, why)[0])
    return builder.finish([n.name for n in nodes])


def is_graph(model: Any) -> bool:
    """Whether the model is made of layers whose connections are known (Sequential or functional, and built)."""
    graph = getattr(model, "_functional", None) is not None or hasattr(model, "_nodes_by_depth")
    # A subclass with its own `call` may do anything between the layers.
    return graph and type(model).call.__module__.startswith("keras.")


class Builder:
    """State of one translation: the graph so far, its modules, and what did not go by the book."""

    def __init__(self, keras: Any) -> None:
        self.keras = keras
        self.backend: str = keras.backend.backend()
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.kept: dict[str, str] = {}
        self.notes: list[str] = []
        self.frozen: list[str] = []
        self.bounds: dict[str, int] = {}
        self._places: dict[tuple[int, str], str] = {}

    def module(self, model: Any) -> fx.GraphModule:
        inputs = [self._input(tensor) for tensor in model.inputs]
        outputs = self._outputs(model, self.inline(model, inputs, ""))
        self.graph.output(outputs)
        return self.finish([v.origin for v in inputs])

    def finish(self, input_names: list[str]) -> fx.GraphModule:
        """The module, once the graph has its output."""
        self.graph.lint()
        if self.kept and self.backend != "torch":
            raise UnsupportedOpError(
                f"no plain torch form for {'; '.join(f'{n} ({why})' for n, why in self.kept.items())}. Such layers can "
                "stay Keras layers inside the module, but only where Keras runs on torch, and here it runs on "
                f"{self.backend}: set KERAS_BACKEND=torch before keras is imported."
            )
        module = fx.GraphModule(self.attributes, self.graph, class_name="KerasModel")
        # Layouts and masks that nobody asked for in the end.
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        module.meta.update(
            input_names=input_names, kept=self.kept, notes=self.notes, frozen=self.frozen,
            bounds=self.bounds,
        )  # fmt: skip
        return module.eval()

    def _input(self, tensor: Any) -> Value:
        name = torch_name(tensor.name).replace(".", "_")
        name = name if name.isidentifier() and not keyword.iskeyword(name) else f"input_{name}"
        node = self.graph.placeholder(name)
        return Value(
            rank=len(tensor.shape), shape=tuple(tensor.shape), dtype=str(tensor.dtype), own=node, origin=node.name
        )

    def _outputs(self, model: Any, values: Sequence[Value]) -> Any:
        call = Call(self, None, "output", (), {})
        nodes = [call.own(v) for v in values]
        packed = self.keras.tree.pack_sequence_as(_graph_of(self.keras, model)._outputs_struct, nodes)
        return tuple(packed) if isinstance(packed, list) else packed

    def inline(self, model: Any, inputs: Sequence[Value], prefix: str) -> list[Value]:
        """The outputs of a model for these inputs; a nested model is written out in place."""
        graph = _graph_of(self.keras, model)
        known = {id(t): v for t, v in zip(graph.inputs, inputs, strict=True)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                self._evaluate(node, known, prefix)
        return [known[id(t)] for t in graph.outputs]

    def _evaluate(self, node: Any, known: dict[int, Value], prefix: str) -> None:
        """Changes `known`: one call of a layer gets its values, unless it has them."""
        if node.is_input or all(id(t) in known for t in node.outputs):
            return
        for tensor in node.input_tensors:
            # Masks hang on tensors, off the way from inputs to outputs.
            if id(tensor) not in known:
                history = tensor._keras_history
                self._evaluate(history.operation._inbound_nodes[history.node_index], known, prefix)
        args, kwargs = node.arguments.fill_in(known)
        name = prefix + torch_name(node.operation.name.replace(".", "_"))
        results = self._call(node.operation, name, args, kwargs, len(node.outputs))
        for tensor, result in zip(node.outputs, results, strict=True):
            value = valued(result, tuple(tensor.shape), str(tensor.dtype))
            known[id(tensor)] = value
            mask = getattr(tensor, "_keras_mask", None)
            if mask is not None:
                value.mask = functools.partial(self._mask, mask, known, prefix)

    def _mask(self, tensor: Any, known: dict[int, Value], prefix: str) -> Value | None:
        history = tensor._keras_history
        self._evaluate(history.operation._inbound_nodes[history.node_index], known, prefix)
        return known.get(id(tensor))

    def _call(self, op: Any, name: str, args: Any, kwargs: dict[str, Any], count: int) -> list[Any]:
        if is_graph(op):
            values = [v for v in self.keras.tree.flatten(args) if isinstance(v, Value)]
            return list(self.inline(op, values, name + "."))
        before, places = len(self.graph.nodes), set(self._places)
        try:
            result = self.translate(op, name, args, kwargs)
        except NoTranslationError as e:
            for node in list(self.graph.nodes)[before:][::-1]:
                self.graph.erase_node(node)
            _forget(args, kwargs, self.graph, self.keras)
            for key in set(self._places) - places:
                self.attributes.pop(self._places.pop(key))
            result = self.keep(op, name, args, kwargs, count, str(e))
        return list(result) if isinstance(result, tuple | list) else [result]

    def translate(self, op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one layer or operation.

        Raises:
            NoTranslationError: it has no plain torch form.
        """
        is_layer = isinstance(op, self.keras.Layer)
        kind = type(op).__name__
        function = (LAYERS if is_layer else OPERATIONS).get(kind)
        # A user's subclass may change anything but the name.
        if function is None or not type(op).__module__.startswith("keras."):
            raise NoTranslationError(f"{kind} is {'not known' if function is None else 'a class of your own'}")
        if is_layer:
            self._refuse_other_precisions(op, name)
        return function(Call(self, op, name, tuple(args), dict(kwargs)))

    def _refuse_other_precisions(self, op: Any, name: str) -> None:
        policy = op.dtype_policy
        if policy.compute_dtype not in ("float32", "float64") or getattr(policy, "quantization_mode", None):
            raise InputError(
                f"the Keras layer {name!r} computes in {policy.name}, which is not translated. Load the model with "
                "keras.config.set_dtype_policy('float32'), and choose the precision here afterwards."
            )

    def keep(self, op: Any, name: str, args: Any, kwargs: dict[str, Any], count: int, why: str) -> list[fx.Node]:
        """The Keras object itself, called from the graph."""
        self.kept.setdefault(name, why)
        path = self.place(op, name, "", lambda: KerasLayer(op))
        plain = {k: v for k, v in kwargs.items() if v is not None}
        call = self.graph.call_module(path, self.nodes(tuple(args)), self.nodes(plain))
        if count == 1:
            return [call]
        return [self.graph.call_function(_item, (call, i)) for i in range(count)]

    def place(self, op: Any, name: str, suffix: str, make: Callable[[], nn.Module]) -> str:
        """The path of a layer's module, which is made where there is none yet."""
        key = (id(op), suffix)
        if key not in self._places:
            path = self._free(name + suffix)
            module = make()
            if not getattr(op, "trainable", True) and next(module.parameters(), None) is not None:
                module.requires_grad_(False)
                self.frozen.append(path)
            self.attributes[path] = module
            self._places[key] = path
        return self._places[key]

    def buffer(self, name: str, value: torch.Tensor) -> fx.Node:
        """A constant of the graph."""
        path = self._free(name)
        self.attributes[path] = value
        return self.graph.get_attr(path)

    def nodes(self, arguments: Any) -> Any:
        """Arguments as the graph holds them: values in their own layout, arrays as buffers."""
        call = Call(self, None, "constant", (), {})

        def plain(argument: Any) -> Any:
            if isinstance(argument, Value):
                return call.own(argument)
            if isinstance(argument, fx.Node | str | int | float | bool | slice | torch.dtype) or argument is None:
                return argument
            if isinstance(argument, tuple | list):
                return type(argument)(plain(a) for a in argument)
            if isinstance(argument, dict):
                return {k: plain(a) for k, a in argument.items()}
            if isinstance(argument, np.ndarray) or self.keras.ops.is_tensor(argument) or hasattr(argument, "numpy"):
                return self.buffer("constant", weight(argument))
            return argument

        return plain(arguments)

    def _free(self, path: str) -> str:
        path = attribute_path(path)
        unique, count = path, 1
        while any(unique == p or unique.startswith(p + ".") or p.startswith(unique + ".") for p in self.attributes):
            unique, count = f"{path}_{count}", count + 1
        return unique


def _graph_of(keras: Any, model: Any) -> Any:
    """The functional graph behind a Sequential or functional model."""
    return model._functional if isinstance(model, keras.Sequential) else model


def _item(values: Any, index: int) -> Any:
    """One tensor of what a Keras layer gave."""
    flat: list[Any] = []
    for value in values.values() if isinstance(values, dict) else values:
        flat.extend(value if isinstance(value, tuple | list) else [value])
    return flat[index]


def _forget(args: Any, kwargs: Any, graph: fx.Graph, keras: Any) -> None:
    """Changes the values: layouts made by nodes that were erased are unknown again."""
    alive = set(graph.nodes)
    for value in keras.tree.flatten((args, kwargs)):
        if isinstance(value, Value):
            value.own = value.own if value.own in alive else None
            value.first = value.first if value.first in alive else None
