"""What no output of an ONNX model needs. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def drop_unused(model: onnx.ModelProto) -> None:
    """Take out nodes and constants that no output needs."""
    used = {o.name for o in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if used & set(node.output):
            used.update(reads(node))
            kept.append(node)
    constants = [i for i in model.graph.initializer if i.name in used]
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads; branches and loop bodies read values from outside of them."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from reads(inner)
            yield from (o.name for o in graph.output)
