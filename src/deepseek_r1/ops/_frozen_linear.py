"""A linear layer whose weight is not trained, with a low-rank pair beside it that is: y = x W^T + b + s (x A^T) B^T.

Autograd's own graph of such a layer under mixed precision keeps a half-precision copy of the frozen weight, and one of
the input for every layer that reads it, until the backward pass. Here a call keeps the weight as it is stored (float,
or 4 bits) and makes the dense one anew for the backward pass; the input is kept in the precision of the computation,
once for all layers that read it, and only for the gradient of A; beside it stand the few columns of x A^T.

Knows how a weight is made dense (a function it is given), and no layers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..core import InputError

#: Gives the dense weight [out, in] in the wanted type: (type, *stored tensors) -> tensor. It may be a view of them.
Dense = Callable[..., Tensor]


class LowRank(NamedTuple):
    """The trained pair of `frozen_linear`.

    Attributes:
        a: [r, in].
        b: [out, r].
        scale: what the product is multiplied with.
        dropout: share of the pair's inputs that is set to zero, 0 outside of training.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product with `x` is computed: autocast's where it is on, else that of `x`.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     compute_dtype(torch.zeros(1))
        torch.bfloat16
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def cast_weight(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """The `Dense` function of a weight that is stored as floats, [out, in]."""
    return weight.to(dtype)


def frozen_linear(
    x: Tensor, dense: Dense, stored: tuple[Tensor, ...], bias: Tensor | None = None, pair: LowRank | None = None
) -> Tensor:
    """A linear layer with a frozen weight; gradients reach the input, the bias and the low-rank pair.

    Args:
        x: [..., in].
        dense: gives the weight, see `Dense`.
        stored: what it is made from; gets no gradients.
        bias: [out].
        pair: trained matrices beside the weight (Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685).

    Returns:
        [..., out], in autocast's type where it is on, else in that of `x`.

    Raises:
        InputError: `x` is no floating tensor.

    Example:
        >>> w, a, b = torch.ones(3, 4), torch.ones(1, 4, requires_grad=True), torch.ones(3, 1)
        >>> y = frozen_linear(torch.ones(2, 4), cast_weight, (w,), None, LowRank(a, b, 0.5))
        >>> y.sum().backward()
        >>> y[0].tolist(), a.grad.tolist()
        ([6.0, 6.0, 6.0], [[3.0, 3.0, 3.0, 3.0]])
    """
    if not x.is_floating_point():
        raise InputError(f"a linear layer needs floating inputs, given {str(x.dtype).removeprefix('torch.')}.")
    trained = (x, bias, *(pair[:2] if pair else ()))
    recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    # A compiler and the transforms of torch.func see through plain operators, and decide themselves what to keep.
    if not recording or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plain(x, dense, stored, bias, pair)
    a, b, scale, dropout = pair or (None, None, 0.0, 0.0)
    result: Tensor = _FrozenLinear.apply(x, bias, a, b, scale, dropout, dense, *stored)  # type: ignore[no-untyped-call]
    return result


def _plain(x: Tensor, dense: Dense, stored: tuple[Tensor, ...], bias: Tensor | None, pair: LowRank | None) -> Tensor:
    dtype = compute_dtype(x)
    with _exact_types(x.device.type):
        x = x.to(dtype)
        y = torch.nn.functional.linear(x, _made_anew(dense, dtype, stored), None if bias is None else bias.to(dtype))
        if pair is None:
            return y
        kept = torch.nn.functional.dropout(x, pair.dropout) if pair.dropout else x
        low = torch.nn.functional.linear(kept, pair.a.to(dtype))
        return y + pair.scale * torch.nn.functional.linear(low, pair.b.to(dtype))


def _made_anew(dense: Dense, dtype: torch.dtype, stored: tuple[Tensor, ...]) -> Tensor:
    """The dense weight; a compiler is told to make it again in the backward pass, as it would keep it otherwise."""
    if not torch.compiler.is_compiling() or (dense is cast_weight and stored[0].dtype == dtype):
        return dense(dtype, *stored)
    return checkpoint(dense, dtype, *stored, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def _exact_types(device: str) -> AbstractContextManager[Any]:
    """Autocast off: the types were chosen already."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
        scale: float, dropout: float, dense: Dense, *stored: Tensor,
    ) -> Tensor:  # fmt: skip
        dtype = compute_dtype(x)
        with _exact_types(x.device.type):
            kept = _cast_once(x, dtype)
            y = torch.nn.functional.linear(kept, dense(dtype, *stored), None if bias is None else bias.to(dtype))
            low = mask = None
            if a is not None and b is not None:
                used = kept
                if dropout:
                    used, mask = torch.native_dropout(kept, dropout, True)
                low = torch.nn.functional.linear(used, a.to(dtype))
                # Added where the base's result already is: no second tensor of its size.
                y.view(-1, y.shape[-1]).addmm_(low.reshape(-1, len(a)), b.to(dtype).t(), alpha=scale)
        needs_x, _, needs_a, needs_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            kept if needs_a else None, low if needs_b else None, mask if needs_a or needs_x else None, a, b,
            *(stored if needs_x else ()),
        )  # fmt: skip
        ctx.scale, ctx.dropout, ctx.dense, ctx.dtype = scale, dropout, dense, dtype
        ctx.shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, low, mask, a, b, *stored = ctx.saved_tensors
        needs_x, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:4]
        # x, bias, a, b; then what has no gradient: scale, dropout, dense, stored.
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        with _exact_types(grad.device.type):
            g = grad.reshape(-1, grad.shape[-1])
            if mask is not None:
                mask = mask.reshape(-1, mask.shape[-1])
            share = 1.0 / (1.0 - ctx.dropout) if ctx.dropout < 1 else 0.0
            if needs_bias:
                grads[1] = g.sum(0, dtype=ctx.bias_dtype)
            if needs_b:
                grads[3] = (g.t() @ low.reshape(-1, low.shape[-1])).mul_(ctx.scale).to(b.dtype)
            g_low = (g @ b.to(ctx.dtype)).mul_(ctx.scale) if b is not None and (needs_a or needs_x) else None
            if needs_a and g_low is not None:
                used = kept.reshape(-1, kept.shape[-1])
                used = used if mask is None else used * mask * share
                grads[2] = (g_low.t() @ used).to(a.dtype)
            if needs_x:
                grads[0] = _input_gradient(ctx, g, g_low, a, mask, share, tuple(stored))
        return tuple(grads)


def _input_gradient(
    ctx: Any, g: Tensor, g_low: Tensor | None, a: Tensor | None, mask: Tensor | None, share: float,
    stored: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    found: Tensor = g @ ctx.dense(ctx.dtype, *stored)
    if g_low is not None and a is not None:
        if mask is None:
            found.addmm_(g_low, a.to(ctx.dtype))
        else:
            found += (g_low @ a.to(ctx.dtype)).mul_(mask).mul_(share)
    return found.to(ctx.x_dtype).reshape(ctx.shape)


class _LastCast(threading.local):
    """The last tensor that was cast and what it became; neither is kept alive by this."""

    source: Callable[[], Tensor | None] = staticmethod(lambda: None)
    result: Callable[[], Tensor | None] = staticmethod(lambda: None)
    version = -1


_last = _LastCast()


def _cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another type; layers that read the same `x` one after the other (query, key, value) share the copy."""
    if x.dtype == dtype:
        return x
    if x.is_inference():
        return x.to(dtype)
    found = _last.result()
    if _last.source() is x and _last.version == x._version and found is not None and found.dtype == dtype:
        return found
    found = x.detach().to(dtype)
    _last.source, _last.result, _last.version = weakref.ref(x), weakref.ref(found), x._version
    return found
