"""An ONNX graph as a torch.fx.GraphModule: one call for each node, in the order of the file.

Float initializers become parameters under their own names, integers and constants become buffers or plain numbers.
Knows nothing about files, and does not check results.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx

from ..core import UnsupportedOpError
from . import _onnx_ops_math, _onnx_ops_nn, _onnx_ops_shape
from ._onnx_values import DTYPES, FROZEN_INPUTS, HOST_SIZE, LITERAL_OPS, OPERATORS, STATIC_INPUTS, tensor

#: Importing these modules fills OPERATORS.
_TABLES = (_onnx_ops_math, _onnx_ops_nn, _onnx_ops_shape)
_ONNX_DOMAINS = ("", "ai.onnx")


def build(model: onnx.ModelProto, class_name: str = "OnnxModel") -> fx.GraphModule:
    """The module that computes what `model` describes, in evaluation mode.

    `meta` holds the file's "input_names" and "output_names".

    Raises:
        UnsupportedOpError: a form of an operator has no translation.
    """
    return _Builder(model).module(class_name)


def torch_name(name: str) -> str:
    """An ONNX name as a path of attributes: letters, digits, underscores, and single dots inside.

    Example:
        >>> torch_name("stem.0.weight"), torch_name("/block/Constant:0")
        ('stem.0.weight', 'block_Constant_0')
    """
    parts = [re.sub(r"\W", "_", part).strip("_") for part in name.split(".")]
    return ".".join(part for part in parts if part) or "value"


def attribute_path(path: str) -> str:
    """The path, changed where torch.fx could not write it down.

    Example:
        >>> attribute_path("block.float.in.weight")
        'block.float_.in_.weight'
    """
    # Methods of Module cannot be set as attributes; keywords cannot stand in the code that torch.fx writes.
    taken = (
        part + "_" if hasattr(torch.nn.Module, part) or keyword.iskeyword(part) else part for part in path.split(".")
    )
    return ".".join(taken)


def _argument_name(name: str) -> str:
    """An input's name as that of a Python argument."""
    plain = torch_name(name).replace(".", "_")
    return plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"input_{plain}"


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that the model was written for."""
    return max((i.version for i in model.opset_import if i.domain in _ONNX_DOMAINS), default=1)


def refuse_unknown(model: onnx.ModelProto) -> None:
    """Raise UnsupportedOpError that names every operator without a translation."""
    unknown: dict[str, str] = {}
    for node in model.graph.node:
        name = node.op_type if node.domain in _ONNX_DOMAINS else f"{node.domain}.{node.op_type}"
        if name != "Constant" and name not in OPERATORS:
            unknown.setdefault(name, node.name or node.output[0])
    if unknown:
        listed = ", ".join(f"{op} (node {where!r})" for op, where in unknown.items())
        raise UnsupportedOpError(
            f"load_onnx has no translation for {listed}; the model uses opset {opset_of(model)}. Export the model "
            "again with standard operators of opset 13 to 20 (not one optimised for a runtime), or rewrite these nodes."
        )


def to_tensor(proto: onnx.TensorProto) -> Tensor:
    """The tensor that an initializer holds."""
    if proto.data_type not in DTYPES:
        kind = onnx.TensorProto.DataType.Name(proto.data_type)
        raise UnsupportedOpError(f"the constant {proto.name!r} has element type {kind}, which load_onnx does not read.")
    array = numpy_helper.to_array(proto)
    if proto.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True, order="C"))


class _Builder:
    """State of one translation: the graph so far, and what each ONNX name stands for."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.opset = opset_of(model)
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        #: ONNX name -> fx node, or a host value known already.
        self.values: dict[str, Any] = {}
        #: Constants of the file that no node has asked for yet: name -> (tensor, whether it is an initializer).
        self.constants: dict[str, tuple[Tensor, bool]] = {}
        self.types: dict[str, int] = {}
        self.fixed: set[str] = set()
        self.static: set[str] = set()
        #: Names that somebody reads; an output that nobody reads need not be computed.
        self.wanted = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        self.wanted.discard("")
        single = {t.name for t in model.graph.initializer if prod(t.dims) == 1}
        for node in model.graph.node:
            self.static.update(_named_inputs(node, STATIC_INPUTS))
            self.fixed.update(_named_inputs(node, FROZEN_INPUTS))
            if node.op_type in LITERAL_OPS:
                self.fixed.update(single.intersection(node.input))

    def module(self, class_name: str) -> fx.GraphModule:
        graph = self.model.graph
        for proto in graph.initializer:
            self._constant(proto.name, proto, is_initializer=True)
        inputs = [i for i in graph.input if i.name not in self.constants]
        for info in inputs:
            self.values[info.name] = self.graph.placeholder(_argument_name(info.name))
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in _ONNX_DOMAINS:
                self._constant_node(node)
            else:
                self._node(node)
        outputs = [self._output(info) for info in graph.output]
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        self.graph.lint()
        module = fx.GraphModule(self.attributes, self.graph, class_name=class_name)
        module.meta["input_names"] = [i.name for i in inputs]
        module.meta["output_names"] = [o.name for o in graph.output]
        return module.eval()

    def _constant(self, name: str, proto: onnx.TensorProto, *, is_initializer: bool) -> None:
        value = to_tensor(proto)
        self.types[name] = proto.data_type
        whole = not value.is_floating_point()
        # Exporters fold literals into scalar float initializers, so a scalar is taken as a number, never trained.
        short = value.dim() == 0 or (
            whole and value.dim() == 1 and value.numel() <= HOST_SIZE and name not in self.fixed
        )
        if name in self.static or (short and value.dtype not in (torch.float16, torch.bfloat16)):
            self.values[name] = value.tolist() if value.dim() <= 1 else value.reshape(-1).tolist()
        self.constants[name] = (value, is_initializer)

    def _constant_node(self, node: onnx.NodeProto) -> None:
        name, attribute = node.output[0], node.attribute[0]
        if attribute.name == "value":
            self._constant(name, attribute.t, is_initializer=False)
            return
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name not in ("value_float", "value_floats", "value_int", "value_ints"):
            raise UnsupportedOpError(f"the Constant {name!r} holds a {attribute.name}, which load_onnx does not read.")
        self.values[name] = list(value) if attribute.name.endswith("s") else value

    def _value(self, name: str) -> Any:
        """What an input name stands for; a constant becomes a parameter or a buffer at its first use."""
        if not name:
            return None
        if name not in self.values:
            value, is_initializer = self.constants[name]
            path = self._free_path(torch_name(name))
            trained = is_initializer and value.is_floating_point() and name not in self.fixed
            self.attributes[path] = torch.nn.Parameter(value) if trained else value
            self.values[name] = self.graph.get_attr(path)
        return self.values[name]

    def _free_path(self, path: str) -> str:
        """`path`, changed where it is taken, or where one name would have to be both a tensor and a module."""

        def clashes(new: str) -> bool:
            return any(new == p or new.startswith(p + ".") or p.startswith(new + ".") for p in self.attributes)

        path = attribute_path(path)
        path = path.replace(".", "_") if clashes(path) else path
        unique, count = path, 1
        while clashes(unique):
            unique, count = f"{path}_{count}", count + 1
        return unique

    def _node(self, node: onnx.NodeProto) -> None:
        used = max((i + 1 for i, name in enumerate(node.output) if name in self.wanted), default=0)
        if not used:
            return
        attrs = {a.name: _attribute(a) for a in node.attribute}
        attrs |= {f"{a.name}_type": a.t.data_type for a in node.attribute if a.type == onnx.AttributeProto.TENSOR}
        attrs |= {
            "op": node.op_type,
            "node": f"{node.op_type} node {node.name or node.output[0]!r}",
            "opset": self.opset,
            "outputs": used,
            "types": [self.types.get(name, 0) for name in node.input],
        }
        function = OPERATORS[node.op_type]
        inputs = [self._value(name) for name in node.input]
        if not any(isinstance(v, fx.Node) for v in inputs):
            result = function(attrs, *inputs)
            if used == 1 and not isinstance(result, Tensor | tuple):
                self.values[node.output[0]] = result
                return
        call = self.graph.create_node("call_function", function, (attrs, *inputs), name=self._call_name(node))
        if used == 1:
            self.values[node.output[0]] = call
            return
        for i, name in enumerate(node.output[:used]):
            if name in self.wanted:
                self.values[name] = self.graph.call_function(operator.getitem, (call, i))

    def _call_name(self, node: onnx.NodeProto) -> str:
        return torch_name(node.name or node.output[0]).replace(".", "_")

    def _output(self, info: onnx.ValueInfoProto) -> fx.Node:
        value = self._value(info.name)
        dtype = DTYPES.get(info.type.tensor_type.elem_type)
        # Shape arithmetic may reach the output as Python numbers.
        return self.graph.call_function(as_output, (value, dtype))


def as_output(value: Any, dtype: torch.dtype | None) -> Tensor:
    """A graph output as a tensor of the declared type."""
    return value if isinstance(value, Tensor) and value.dtype == dtype else tensor(value, dtype=dtype)


def _named_inputs(node: onnx.NodeProto, table: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for index in table.get(node.op_type, ()):
        if index < len(node.input) and node.input[index]:
            yield node.input[index]


def _attribute(attribute: onnx.AttributeProto) -> Any:
    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        raise UnsupportedOpError(
            f"load_onnx does not translate control flow (the attribute {attribute.name!r} is a graph)."
        )
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        # Only a filling value comes this way; as a number it stays readable for torch.export.
        return to_tensor(value).reshape(-1)[0].item()
    if isinstance(value, bytes):
        return value.decode()
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [v.decode() for v in value]
    return list(value) if not isinstance(value, str | int | float) else value
