"""What one operator computes and moves: floating-point operations and the least bytes of memory traffic.

Conventions: a multiplication and an addition are two operations; an element-wise operator does one for each element
of its result, whatever it takes in cycles; a reduction one for each element read. Integer arithmetic counts none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

#: Operations for each element; a batch norm with fixed statistics is one multiplication and one addition.
_NORMS = {"native_layer_norm": 5, "native_group_norm": 5, "_fused_rms_norm": 4, "native_batch_norm": 2,
          "_native_batch_norm_legit_no_training": 2, "cudnn_batch_norm": 2}  # fmt: skip
_SOFTMAX = {"_softmax", "_log_softmax", "_safe_softmax"}
_REDUCTIONS = {"sum", "mean", "prod", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp",
               "cumsum", "cumprod", "nansum"}  # fmt: skip
_AVERAGES = {"_adaptive_avg_pool2d", "_adaptive_avg_pool3d"}
_LOOKUPS = {"embedding", "index", "index_select", "gather", "take", "take_along_dim"}
#: Copies and choices are tagged as element-wise, but compute nothing.
_MOVES = {
    "clone",
    "copy",
    "copy_",
    "_to_copy",
    "fill",
    "fill_",
    "where",
    "masked_fill",
    "constant_pad_nd",
    "bitwise_not",
}
#: Arithmetic for which there is no formula here.
_UNKNOWN = ("linalg_", "_linalg", "cholesky", "grid_sampler", "_cdist", "_ctc_loss", "_grouped_mm", "_scaled_grouped")


@dataclass(frozen=True, kw_only=True)
class OperatorCost:
    """Cost of one call of one operator.

    Attributes:
        flops: floating-point operations; None where they are not known (an operator of somebody else's).
        read_bytes: every input once; of a table that is looked up in, the rows taken; none for a view.
        written_bytes: every new or changed output once.
    """

    flops: int | None
    read_bytes: int
    written_bytes: int


def operator_cost(
    operator: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[Any, OperatorCost]:
    """Run an operator; its result and its cost. An operator made of others costs what they cost together.

    It runs a second time to be counted, unless it changes its arguments. The formulas for matrix products,
    convolutions and attention are torch's own (torch.utils.flop_counter).

    Example:
        >>> out, cost = operator_cost(torch.ops.aten.mm.default, (torch.ones(2, 3), torch.ones(3, 4)))
        >>> cost.flops, cost.read_bytes, cost.written_bytes
        (48, 72, 32)
    """
    kwargs = kwargs or {}
    if isinstance(operator, torch._ops.OpOverload):
        with _Counting() as counting:
            out = operator(*args, **kwargs)
        flops: int | None = None if counting.unknown else counting.flops
        if not operator._schema.is_mutable:
            # Taken apart, an operator may copy what it would give back as it is.
            out = operator(*args, **kwargs)
    else:
        out = operator(*args, **kwargs)
        formula = flop_registry.get(operator)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else None
    read, written = _traffic(operator, args, kwargs, out)
    return out, OperatorCost(flops=flops, read_bytes=read, written_bytes=written)


class _Counting(TorchDispatchMode):
    """Adds up the operations of the basic operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.unknown = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            # Without autograd, torch hands over composite operators whole; torch's own kernel of parts runs here.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        flops = _flops(func, args, kwargs, out)
        self.unknown |= flops is None
        self.flops += flops or 0
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    name = func._schema.name.partition("::")[2]
    own = _FORMULAS.get(name)
    if own is not None:
        return own(args, out)
    if name.startswith(_UNKNOWN) or func.namespace not in ("aten", "prims", "quantized_decomposed"):
        return None
    result, source = _first(out), _first((args, kwargs))
    if result is None or not (result.is_floating_point() or result.is_complex()):
        return 0  # integers and comparisons
    if name in _NORMS:
        return _NORMS[name] * _numel(source)
    if name in _SOFTMAX:
        return 3 * _numel(source)
    if name in _REDUCTIONS or name in _AVERAGES:
        return _numel(source)
    moves = name in _MOVES or func.is_view
    pointwise = torch.Tag.pointwise in func.tags or func.namespace == "quantized_decomposed"
    return _numel(result) if pointwise and not moves else 0


def _attention(args: Any, out: Any) -> int:
    query, key, value = args[:3]
    rows = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(2 * rows * (query.shape[-1] + value.shape[-1]))


def _recurrent(args: Any, out: Any) -> int:
    # Every step and sample is multiplied with both weight matrices, input to hidden and hidden to hidden.
    steps = math.prod(args[0].shape[:2])
    weights = [t for t in pytree.tree_leaves(args[1:3]) if isinstance(t, Tensor) and t.ndim == 2]
    return int(2 * steps * sum(t.numel() for t in weights))


def _fourier(args: Any, out: Any) -> int:
    # The usual count for a complex transform of length n is 5 n log2 n, half of it if one side is real.
    whole = max(_numel(args[0]), _numel(out))
    length = math.prod(max(args[0].shape[d], out.shape[d]) for d in args[1])
    both = args[0].is_complex() and out.is_complex()
    return int((5 if both else 2.5) * whole * math.log2(max(length, 2)))


def _windows(args: Any, out: Any) -> int:
    return int(_numel(out) * math.prod(args[1]))


_FORMULAS: dict[str, Callable[[Any, Any], int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "mkldnn_rnn_layer": _recurrent,
    "_cudnn_rnn": _recurrent,
    "mv": lambda args, out: 2 * _numel(args[0]),
    "addmv": lambda args, out: 2 * _numel(args[1]),
    "dot": lambda args, out: 2 * _numel(args[0]),
    "vdot": lambda args, out: 2 * _numel(args[0]),
    "_fft_r2c": _fourier,
    "_fft_c2r": _fourier,
    "_fft_c2c": _fourier,
    "avg_pool2d": _windows,
    "avg_pool3d": _windows,
}


def _tensors(value: Any) -> Iterator[Tensor]:
    return (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


def _first(value: Any) -> Tensor | None:
    return next(_tensors(value), None)


def _numel(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _traffic(operator: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    schema = getattr(operator, "_schema", None)
    inputs = {(_storage(t), t.storage_offset(), t.shape): t for t in _tensors((args, kwargs))}
    there = {_storage(t) for t in inputs.values()}
    new = [t for t in _tensors(out) if _storage(t) not in there]
    changed = []
    if schema is not None and schema.is_mutable:
        given = {a.name: v for a, v in zip(schema.arguments, args)} | kwargs
        marked = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        changed = [t for name in marked for t in _tensors(given.get(name))]
    written = sum(_extent(t) for t in (*new, *changed))
    if not written:  # a view, or nothing at all
        return 0, 0
    read = [_extent(t) for t in inputs.values()]
    if schema is not None and schema.name.partition("::")[2] in _LOOKUPS and read:
        read[0] = min(read[0], sum(_extent(t) for t in new))
    return sum(read), written


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _extent(tensor: Tensor) -> int:
    """Bytes behind a tensor; of an expanded one, only what there is."""
    size = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else size
