"""Activation functions that were written out are named again, whatever the order in which they were multiplied.

An expression over a value x and its gate u (the error function, tanh, sigmoid, ...) is expanded into a polynomial in
x and u; if the polynomial is that of a known activation function, one operator takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..editing import add_call, argument
from ._effects import Aliases
from ._tidy import constant_scalar, sizes

aten = torch.ops.aten
#: (power of x, power of u) -> coefficient
Polynomial = dict[tuple[int, int], float]
_DEPTH = 6


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """`whole`(x, u) with u = gate(`inner`(x)) is `target`(x, **options)."""

    gate: Any
    inner: Polynomial
    whole: Polynomial
    target: Any
    options: dict[str, Any] = field(default_factory=dict)
    gate_args: tuple[Any, ...] = ()


_ROOT = math.sqrt(2 / math.pi)
_HALF = {(1, 0): 0.5, (1, 1): 0.5}
_RULES = (
    # Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    _Rule(gate=aten.erf.default, inner={(1, 0): math.sqrt(0.5)}, whole=_HALF, target=aten.gelu.default),
    _Rule(gate=aten.tanh.default, inner={(1, 0): _ROOT, (3, 0): _ROOT * 0.044715}, whole=_HALF,
          target=aten.gelu.default, options={"approximate": "tanh"}),
    _Rule(gate=aten.exp.default, inner={(1, 0): -1.0}, whole={(0, 0): 1.0, (0, 1): 1.0}, target=aten.sigmoid.default),
    _Rule(gate=aten.sigmoid.default, inner={(1, 0): 1.0}, whole={(1, 1): 1.0}, target=aten.silu.default),
    _Rule(gate=aten.hardsigmoid.default, inner={(1, 0): 1.0}, whole={(1, 1): 1.0}, target=aten.hardswish.default),
    *(_Rule(gate=gate, gate_args=args, inner={(1, 0): 1.0, (0, 0): 3.0}, whole={(power, 1): 1 / 6}, target=target)
      for gate, args in ((aten.relu6.default, ()), (aten.hardtanh.default, (0, 6)), (aten.clamp.default, (0, 6)))
      for power, target in ((1, aten.hardswish.default), (0, aten.hardsigmoid.default))),
)  # fmt: skip


def name_activations(module: GraphModule) -> int:
    """Put GELU (erf, tanh), sigmoid, SiLU, hard sigmoid and hard swish that were written out into one operator."""
    count = 0
    gates = list(module.graph.nodes)
    for gate in gates:  # a function that was found may be the gate of another, so the list grows
        for rule in (r for r in _RULES if gate.target is r.gate and tuple(gate.args[1:]) == r.gate_args):
            found = _match(module, gate, rule)
            if found is None or not Aliases(module).stable(*found[2]):
                continue
            if (new := _replace(*found[:2], rule)) is not None:
                gates.append(new)
                count += 1
                break
    return count


def _replace(x: Node, top: Node, rule: _Rule) -> Node | None:
    if rule.target is not aten.sigmoid.default:
        new = add_call(top, rule.target, (x,), dict(rule.options))
        top.replace_all_uses_with(new)
        return new
    # 1 + exp(-x) is of use only where something is divided by it.
    divisions = [n for n in top.users if n.target is aten.div.Tensor and n.args[1] is top and n.args[0] is not top]
    inverses = [n for n in top.users if n.target is aten.reciprocal.default]
    if not top.users or len(divisions) + len(inverses) != len(top.users):
        return None
    new = add_call(top, rule.target, (x,))
    for node in inverses:
        node.replace_all_uses_with(new)
    for node in divisions:
        node.replace_all_uses_with(add_call(node, aten.mul.Tensor, (node.args[0], new)))
    return new


def _match(module: GraphModule, gate: Node, rule: _Rule) -> tuple[Node, Node, set[Node]] | None:
    """x, the node that is the whole function of it, and all nodes that were read to know."""
    inner = gate.args[0]
    if not isinstance(inner, Node):
        return None
    for x in _below(inner, _DEPTH):
        value = x.meta.get("val")
        read: set[Node] = {gate}
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if not _close(_expand(module, inner, {x: (1, 0)}, read, _DEPTH), rule.inner):
            continue
        for top in _above(gate, _DEPTH):
            seen = set(read)
            if _close(_expand(module, top, {x: (1, 0), gate: (0, 1)}, seen, _DEPTH), rule.whole) and _alike(x, top):
                return x, top, seen
    return None


def _alike(one: Node, other: Node) -> bool:
    return one.meta["val"].dtype == other.meta["val"].dtype and sizes(one) == sizes(other)


def _below(node: Node, depth: int) -> Iterator[Node]:
    yield node
    if depth and node.target in _ARITHMETIC:
        for source in node.all_input_nodes:
            yield from _below(source, depth - 1)


def _above(node: Node, depth: int) -> Iterator[Node]:
    yield node
    for user in node.users if depth else ():
        if user.target in _ARITHMETIC:
            yield from _above(user, depth - 1)


_ARITHMETIC = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.rsub.Scalar, aten.square.default,
)  # fmt: skip


def _expand(
    module: GraphModule, value: Any, variables: dict[Node, tuple[int, int]], read: set[Node], depth: int
) -> Polynomial | None:
    """A value as a polynomial in the variables; None if it is none. Nodes on the way are added to `read`."""
    if isinstance(value, Node):
        read.add(value)
        if value in variables:
            return {variables[value]: 1.0}
    number = constant_scalar(module, value)
    if number is not None:
        return {(0, 0): float(number)}
    if not isinstance(value, Node) or value.target not in _ARITHMETIC or not depth:
        return None
    a = _expand(module, value.args[0], variables, read, depth - 1)
    if a is None:
        return None
    if value.target is aten.neg.default:
        return _times(a, {(0, 0): -1.0})
    if value.target in (aten.pow.Tensor_Scalar, aten.square.default):
        power = argument(value, 1, 2)
        return _power(a, int(power)) if power in (1, 2, 3) else None
    b = _expand(module, value.args[1], variables, read, depth - 1)
    if b is None:
        return None
    if value.target is aten.mul.Tensor:
        return _times(a, b)
    if value.target is aten.div.Tensor:
        divisor = b.get((0, 0), 0.0)
        return _times(a, {(0, 0): 1 / divisor}) if set(b) == {(0, 0)} and divisor else None
    if value.target is aten.rsub.Scalar:
        a, b = b, a
    sign = 1.0 if value.target is aten.add.Tensor else -1.0
    alpha = argument(value, 2, 1) if value.target is aten.rsub.Scalar else value.kwargs.get("alpha", 1)
    return _plus(a, _times(b, {(0, 0): sign * float(alpha)})) if isinstance(alpha, int | float) else None


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in {**a, **b}}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for (i, j), p in a.items():
        for (k, m), q in b.items():
            product[i + k, j + m] = product.get((i + k, j + m), 0.0) + p * q
    return product


def _power(a: Polynomial, power: int) -> Polynomial:
    result = a
    for _ in range(power - 1):
        result = _times(result, a)
    return result


def _close(found: Polynomial | None, wanted: Polynomial) -> bool:
    # A constant may have been rounded to float32, but not to four digits: that would be another function.
    kept = {key: value for key, value in (found or {}).items() if abs(value) > 1e-9}
    return kept.keys() == wanted.keys() and all(math.isclose(kept[k], v, rel_tol=1e-7) for k, v in wanted.items())
