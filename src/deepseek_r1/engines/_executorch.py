"""ExecuTorch with XNNPACK's CPU kernels as an engine. Quantised programs go in as they are, except at their outputs.

ExecuTorch lays out all memory beforehand, so each dynamic size gets an upper bound, see `_bounds`; inputs beyond it,
and empty ones, are answered by PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..core import QUANTISED
from ..graph import Program, rewrite
from ..graph._capture import torch_export
from ..graph.editing import add_constant, constant_value
from ..graph.quiet import quiet_torch
from . import _bounds
from ._bounds import Limit
from ._float_weights import float_groups
from ._refusals import changes_state, eager_where, not_on_the_cpu, unrolls
from .base import Engine, Runner

_PROGRAM, _ABOUT = "model.pte", "about.json"
_BINDINGS = "executorch.extension.pybindings.portable_lib"
aten, _q = torch.ops.aten, torch.ops.quantized_decomposed
_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
_ACTIVATIONS = (
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default,
    aten.clamp.default, aten.clamp_min.default,
)  # fmt: skip
_KEEPS_VALUES = (
    aten.max_pool2d.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default,
    aten.transpose.int, aten.slice.Tensor, aten.squeeze.dim, aten.unsqueeze.default, aten.contiguous.default,
)  # fmt: skip
#: Keeps a tensor of zeros from a scale of 0.
_SMALLEST_SCALE = torch.finfo(torch.float32).eps
#: Names of products and convolutions once lowered.
_PRODUCTS = ("aten.convolution", "aten.linear", "aten.addmm", "aten.mm")


class ExecuTorchEngine(Engine):
    """Lowers to XNNPACK and writes one `.pte` file, which ExecuTorch's runtimes on phones and boards open too."""

    name = "executorch"
    portable = True

    def unavailable(self) -> str:
        """Needs the package."""
        return "" if find_spec("executorch") else "executorch is not installed: pip install 'deepseek-r1[executorch]'"

    def unsupported(self, program: Program) -> str:
        """CPU tensors only, no state, and no recurrent layer of any length."""
        return not_on_the_cpu(program) or changes_state(program) or unrolls(program)

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Lower what XNNPACK can compute to it, the rest to ExecuTorch's portable kernels."""
        limits = _bounds.limits(program)
        with _quiet_import():
            from executorch.exir import to_edge_transform_and_lower

            exported = _bounded(retarget(program) if precision in QUANTISED else program, limits)
            # Kernel choices look at the example's sizes and would narrow the bounds to sizes of the same choice.
            with _no_new_guards(exported):
                edge = to_edge_transform_and_lower(exported, partitioner=[_partitioner(program)])
                data = edge.to_executorch().buffer
        (folder / _PROGRAM).write_bytes(data)
        about = {"limits": limits, "integer_kernels": _integer_kernels(edge.exported_program().graph_module)}
        (folder / _ABOUT).write_text(json.dumps(about))

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Load the file's one method."""
        limits: list[Limit] = json.loads((folder / _ABOUT).read_text())["limits"]
        _match_threads()
        with _quiet_import():
            from executorch.runtime import Runtime

            loaded = Runtime.get().load_program((folder / _PROGRAM).read_bytes())
            loaded.load_method("forward")
        busy = threading.Lock()

        def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
            inputs = [v.detach().contiguous() if isinstance(v, torch.Tensor) else v for v in leaves]
            # One method has one set of buffers; its outputs are copied out of them. It must not outlive its program,
            # so it is taken from there each time.
            with busy:
                outputs = loaded.load_method("forward").execute(inputs)
            return [v for v in outputs if isinstance(v, torch.Tensor)]

        return eager_where(_bounds.beyond(limits), run, program)

    def integer_kernels(self, folder: Path) -> int:
        """How many products and convolutions were lowered to XNNPACK between integer tensors."""
        count: int = json.loads((folder / _ABOUT).read_text())["integer_kernels"]
        return count


def _bounded(program: Program, limits: list[Limit]) -> ExportedProgram:
    """The program captured again with its dynamic sizes limited, and attention in operators that XNNPACK has."""
    args, kwargs = program.example_inputs
    most = {(number, axis): size for number, axis, size in limits}
    module: GraphModule = program.exported.module(check_guards=False)  # type: ignore[assignment]
    for node in module.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            node.target = _attention
    module.recompile()
    return torch_export(module, args, kwargs, program.dynamic_shapes(most))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` with its care for rows that are masked as a whole kept to the mask.

    PyTorch's own way looks for such rows in all scores, with operators that XNNPACK does not have.
    """
    if dropout_p or enable_gqa or not (is_causal or attn_mask is not None):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        rows, columns = (torch.arange(v.shape[-2], device=query.device) for v in (query, key))
        attn_mask = columns <= rows.unsqueeze(-1)
    assert attn_mask is not None
    if attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), -math.inf)
    nothing = attn_mask.amax(-1, keepdim=True) == -math.inf
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    score = (query * factor) @ key.transpose(-2, -1) + attn_mask.masked_fill(nothing, 0.0)
    return score.softmax(-1) @ value * nothing.logical_not().to(value.dtype)


def retarget(program: Program) -> Program:
    """Give layers whose results stay float a form that XNNPACK has: it computes int8 from int8 to int8 only.

    A linear layer gets activations quantised as they come (their range found at each call), from which XNNPACK
    computes floats in integers. A convolution gets float weights. So does a layer with stored weights alone, or in 4
    bits, and its activations stay float too. Where values are only moved or the largest is picked, the scale before
    holds behind as well: XNNPACK wants it so, and nothing is rounded twice.
    """

    def change(module: GraphModule) -> int:
        groups = float_groups(module)
        layers = [n for n in module.graph.nodes if n.target in (aten.linear.default, *_CONVOLUTIONS)]
        stored = [n for n in layers if _is_stored(n.args[0]) and _is_stored(n.args[1])]
        found = [n for n in stored if not _is_dynamic(n.args[0]) and not _becomes_stored(n)]
        for node in found:
            if node.target is aten.linear.default:
                _quantize_dynamically(node)
            else:
                _float_weight(module, node)
        alone = [n for n in layers if _is_stored(n.args[1]) and not _is_stored(n.args[0])]
        for node in alone:
            _float_weight(module, node)
        for node in layers:
            if _is_dynamic(node.args[0]) and not _is_stored(node.args[1]):
                node.update_arg(0, node.args[0].args[0].args[0])
        return groups + len(alone) + len(found) + sum(_keep_scale(node) for node in module.graph.nodes)

    return rewrite(program, change)


def _keep_scale(node: Any) -> bool:
    """Give a quantize node, and its way back, the scale that its values are in already; whether that changed it."""
    if node.target is not _q.quantize_per_tensor.default:
        return False
    source = node.args[0]
    while source.target in _KEEPS_VALUES:
        source = source.args[0]
    if source.target is not _q.dequantize_per_tensor.default or source.args[1:] == node.args[1:]:
        return False
    for one in (node, *node.users):
        one.args = (one.args[0], *source.args[1:])
    return True


def _becomes_stored(node: Node) -> bool:
    users = list(node.users)
    if len(users) == 1 and users[0].target in _ACTIVATIONS:
        users = list(users[0].users)
    return all(user.target is _q.quantize_per_tensor.default for user in users)


def _quantize_dynamically(node: Any) -> None:
    stored = node.args[0].args[0]
    graph, value = node.graph, stored.args[0]
    with graph.inserting_before(node):
        chosen = graph.call_function(_q.choose_qparams.tensor, (value, -128, 127, _SMALLEST_SCALE, torch.int8))
        limits = (*(graph.call_function(operator.getitem, (chosen, i)) for i in (0, 1)), -128, 127, torch.int8)
        stored = graph.call_function(_q.quantize_per_tensor.tensor, (value, *limits))
        node.update_arg(0, graph.call_function(_q.dequantize_per_tensor.tensor, (stored, *limits)))


def _float_weight(module: GraphModule, node: Any) -> None:
    weight = constant_value(module, node.args[1])
    assert weight is not None, "a stored weight depends on constants only"
    node.update_arg(1, add_constant(module, node, weight, "float_weight"))


def _partitioner(program: Program) -> Any:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    symbols = {size for shape in program.input_shapes() for size in shape if isinstance(size, str)}
    if len(symbols) < 2:
        return XnnpackPartitioner()
    # XNNPACK's reshape finds one size at most, and the partitioner checks that for views only (as of 1.5).
    kept = [c for c in ALL_PARTITIONER_CONFIGS if c.__name__ != "UnsqueezeCopyConfig"]
    return XnnpackPartitioner(configs=kept)


def _integer_kernels(module: GraphModule) -> int:
    from executorch.exir.lowered_backend_module import get_lowered_backend_modules

    nodes = [n for part in get_lowered_backend_modules(module) for n in part.original_module.graph.nodes]
    return sum(_is_product(n) and all(_is_stored(v) for v in n.all_input_nodes[:2]) for n in nodes)


def _is_product(node: Node) -> bool:
    return node.op == "call_function" and any(name in str(node.target) for name in _PRODUCTS)


def _is_stored(node: Any) -> bool:
    return isinstance(node, Node) and "dequantize" in str(node.target)


def _is_dynamic(node: Any) -> bool:
    return isinstance(node, Node) and node.target is _q.dequantize_per_token.default


def _match_threads() -> None:
    """Give ExecuTorch's pool as many threads as PyTorch has. Once programs are loaded, their kernels hold the pool."""
    if _BINDINGS in sys.modules:
        return
    with _quiet_import():
        from executorch.extension.pybindings import portable_lib
    if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())


@contextlib.contextmanager
def _no_new_guards(exported: ExportedProgram) -> Iterator[None]:
    sizes = [d for n in exported.graph.nodes for d in getattr(n.meta.get("val"), "shape", ())]
    symbolic = next((d for d in sizes if isinstance(d, torch.SymInt)), None)
    if symbolic is None:
        yield
        return
    with symbolic.node.shape_env.suppress_guards():
        yield


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Silence, and the root logger as it was: the lowering sets up logging when it is imported."""
    root, others = logging.getLogger(), logging.getLogger("torchao")
    handlers, level, other = root.handlers[:], root.level, others.level
    others.setLevel(logging.CRITICAL)
    try:
        with quiet_torch():
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        others.setLevel(other)
