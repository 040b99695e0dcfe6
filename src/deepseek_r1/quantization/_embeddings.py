"""Embedding tables in 4 or 8 bits: rows are gathered as they are stored and then made real numbers.

A table that is also the weight of a linear layer, as in language models, is stored once, in that layer's format.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import GraphModule, Node

from ..core import INT8_WEIGHT, Int4Format, LayerFormat, Report
from ..graph.editing import add_constant, argument, constant_of
from ..ops import gather_int8, gather_uint4, pack_uint4
from ._groups import method_for, quantize_groups
from ._layers import Layer, check_finite, layer_name, undivided, unusable
from ._observe import quantize_weight

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed


def tied_layers(module: GraphModule, formats: Mapping[Layer, LayerFormat]) -> dict[Node, Node]:
    """Embedding nodes whose table is the weight of a layer that is quantised, with a node of that layer.

    To be asked before weights are stored, when the two still read the same tensor.
    """
    owners = {
        layer.weight.untyped_storage().data_ptr(): layer.nodes[0]
        for layer, fmt in formats.items() if layer.is_linear and fmt.is_quantised
    }  # fmt: skip
    found = {}
    for node in _embeddings(module):
        table = constant_of(module, argument(node, 0))
        if table is not None and table.untyped_storage().data_ptr() in owners:
            found[node] = owners[table.untyped_storage().data_ptr()]
    return found


def store_tables(
    module: GraphModule, fmt: LayerFormat, tied: Mapping[Node, Node], clip: str, group_clip: str,
    skip: tuple[str, ...], report: Report,
) -> list[LayerFormat]:  # fmt: skip
    """Changes the graph: embeddings read tables in 4 or 8 bits.

    Args:
        fmt: of tables that are not tied: `Int8Weight` or `Int4Weight`.
        tied: from `tied_layers`; the weights of those layers have been stored by now.
        clip: how the range of 8-bit rows is found; `group_clip` that of 4-bit groups.
        report: takes what was done; what it had skipped because embeddings stay float is taken out.

    Returns:
        The format of each table that is stored anew.
    """
    tables: dict[object, tuple[object, tuple[Node, ...]]] = {}
    shared = {_table_of(module, node) for node in _embeddings(module)} & _float_readers(module)
    done: list[LayerFormat] = []
    for number, node in enumerate(_embeddings(module)):
        name = layer_name(node)
        weight = constant_of(module, argument(node, 0))
        reason = unusable(name, weight, skip)
        key = _table_of(module, node)
        if not reason and node not in tied:
            assert weight is not None
            reason = undivided(fmt, weight.shape[1])
            if key in shared:
                reason = "its table is the weight of a layer that stays float"
        _forget(report, name, node)
        if weight is None or reason:
            report.skip(name, reason)
            continue
        check_finite(name, weight)
        if key not in tables:
            if node in tied:
                tables[key] = _stored_with(tied[node])
                report.add(f"embedding {name}", "stored once with the layer that has the same weight")
            else:
                tables[key] = _store(module, weight, fmt, number, clip, group_clip)
                done.append(fmt)
                report.add(f"embedding {name}", str(fmt), before="float32")
        function, constants = tables[key]
        with module.graph.inserting_before(node):
            rows = module.graph.call_function(function, (*constants, argument(node, 1)))  # type: ignore[arg-type]
        node.replace_all_uses_with(rows)
    return done


def _embeddings(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.target is aten.embedding.default and node.users]


def _table_of(module: GraphModule, node: Node) -> int:
    table = constant_of(module, argument(node, 0))
    return 0 if table is None else table.untyped_storage().data_ptr()


def _float_readers(module: GraphModule) -> set[int]:
    """Tensors that something other than an embedding reads."""
    found = set()
    for node in module.graph.nodes:
        tensor = constant_of(module, node)
        if tensor is not None and any(user.target is not aten.embedding.default for user in node.users):
            found.add(tensor.untyped_storage().data_ptr())
    return found


def _forget(report: Report, name: str, node: Node) -> None:
    general = (name, f"no quantised form for {node.target}")
    if general in report.skipped:
        report.skipped.remove(general)


def _stored_with(layer: Node) -> tuple[object, tuple[Node, ...]]:
    """The function and the constants that give rows of what a stored layer multiplies with."""
    weight = layer.args[1]
    assert isinstance(weight, Node), "a stored layer reads a node that dequantises"
    values, scales, zeros = weight.args[:3]
    assert isinstance(values, Node)
    assert isinstance(scales, Node)
    assert isinstance(zeros, Node)
    if weight.target is _q.dequantize_per_channel_group.default:
        return gather_uint4, (values.all_input_nodes[0], scales, zeros)
    return gather_int8, (values, scales)


def _store(
    module: GraphModule, weight: torch.Tensor, fmt: LayerFormat, number: int, clip: str, group_clip: str
) -> tuple[object, tuple[Node, ...]]:
    first = next(n for n in module.graph.nodes if n.op == "call_function")
    if isinstance(fmt, Int4Format):
        grouped = quantize_groups(
            weight, fmt.group_size, symmetric=fmt.symmetric, method=method_for(group_clip, compensated=False)
        )
        parts = {"packed": pack_uint4(grouped.values), "scale": grouped.scales, "zero": grouped.zeros}
    else:
        values, scales = quantize_weight(weight, INT8_WEIGHT, clip)
        parts = {"rows": values, "scale": scales}
    constants = tuple(add_constant(module, first, v, f"table{number}_{k}") for k, v in parts.items())
    return (gather_uint4 if len(constants) == 3 else gather_int8), constants
