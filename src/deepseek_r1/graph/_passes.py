"""Rewrites of a Program, as a list of named functions on its graph; each is verified after it runs.

Own passes are few on purpose: engines fold and fuse by themselves. Batch normalisation is folded here because
weights must be quantised as the engine will use them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from ..core import CaptureError
from ..measure import compare
from .editing import add_constant, argument, constant_of, rewrite
from .program import Program, float64_module, to_float64

aten = torch.ops.aten
_CONV = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip


def _fold_batch_norm(module: GraphModule) -> int:
    count = 0
    for norm in list(module.graph.nodes):
        if norm.target is not aten.batch_norm.default or argument(norm, 5) is not False:
            continue
        conv = norm.args[0]
        if not isinstance(conv, Node) or conv.target not in _CONV or len(conv.users) != 1:
            continue
        weight = constant_of(module, conv.args[1])
        gain, shift, mean, variance = (constant_of(module, a) for a in norm.args[1:5])
        if weight is None or mean is None or variance is None:
            continue
        bias = constant_of(module, argument(conv, 2))
        # In float64, so that folding costs no more than one rounding of each weight.
        scale = torch.rsqrt(variance.double() + float(norm.args[7]))
        if gain is not None:
            scale = scale * gain.double()
        folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
        base = bias.double() if bias is not None else torch.zeros_like(mean, dtype=torch.float64)
        offset = (base - mean.double()) * scale + (shift.double() if shift is not None else 0.0)
        stem = f"folded_{count}"
        new_weight = add_constant(module, conv, folded.to(weight.dtype).detach(), f"{stem}_weight")
        new_bias = add_constant(module, conv, offset.to(weight.dtype).detach(), f"{stem}_bias")
        conv.args = (conv.args[0], new_weight, new_bias, *conv.args[3:])
        norm.replace_all_uses_with(conv)
        module.graph.erase_node(norm)
        count += 1
    return count


def _remove_dropout(module: GraphModule) -> int:
    gone = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
    nodes = [n for n in module.graph.nodes if n.target in gone and argument(n, 2) is False]
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    return len(nodes)


#: Passes by name, in the order in which `simplify` runs them. Each returns how many places it changed.
PASSES: dict[str, Callable[[GraphModule], int]] = {
    "fold_batch_norm": _fold_batch_norm,
    "remove_dropout": _remove_dropout,
}


def simplify(program: Program, passes: tuple[str, ...] = tuple(PASSES)) -> Program:
    """Run the named passes; each that changed something is verified on the example inputs in float64.

    Raises:
        CaptureError: a pass changed the program's answers. That is a fault of the pass; the message names it.
    """
    for name in passes:
        program = _verified(program, name)
    return program


def fold_batch_norm(program: Program) -> Program:
    """Fold each batch normalisation into the convolution before it.

    Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 3.2.
    """
    return simplify(program, ("fold_batch_norm",))


def _verified(program: Program, name: str) -> Program:
    counts: list[int] = []

    def change(module: GraphModule) -> int:
        counts.append(PASSES[name](module))
        return counts[0]

    report = copy.deepcopy(program.report)
    after = rewrite(program, change, report=report)
    if after is program:
        return program
    error = _largest_change(program, after)
    detail = f"{counts[0]} places, largest relative change {error:.1e}"
    if not report.check(f"pass {name}", error <= 1e-6, detail):
        raise CaptureError(
            f"the pass {name!r} changed the program's answers by {error:.1e} (relative); it is not used."
        )
    return after


def _largest_change(before: Program, after: Program) -> float:
    args, kwargs = to_float64(before.example_inputs)
    with torch.no_grad():
        a = pytree.tree_leaves(float64_module(before)(*args, **kwargs))
        b = pytree.tree_leaves(float64_module(after)(*args, **kwargs))
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor) and x.numel():
            largest = float(x.double().nan_to_num(0.0, 0.0, 0.0).abs().max())
            worst = max(worst, compare([x.cpu().numpy()], [y.cpu().numpy()]).max_abs / max(largest, 1e-12))
    return worst
