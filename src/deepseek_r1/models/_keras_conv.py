"""Keras' convolutions, pools, and what else works on the places of a picture or a signal."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._keras_modules import CroppedTranspose, SameAveragePool, SamePad
from ._keras_values import Call, First, NoTranslationError, fill_, layer, weight

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_CONSTANT: dict[int, Any] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}
_REPEATED: dict[int, Any] = {1: nn.ReplicationPad1d, 2: nn.ReplicationPad2d, 3: nn.ReplicationPad3d}
_MAX: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

Pads = list[tuple[int, int]]


def same_pads(sizes: Sequence[int | None], kernel: Sequence[int], stride: Sequence[int]) -> Pads | None:
    """What "same" adds before and after each dimension, as TensorFlow defines it; None where that needs sizes.

    Example:
        >>> same_pads([8, 7], [3, 3], [2, 2])
        [(0, 1), (1, 1)]
    """
    pads = []
    for size, k, s in zip(sizes, kernel, stride, strict=True):
        if s > 1 and size is None:
            return None
        total = k - 1 if s == 1 or size is None else max((-(-size // s) - 1) * s + k - size, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def _constant_pad(pads: Pads, value: float = 0.0) -> nn.Module:
    flat = tuple(n for pair in reversed(pads) for n in pair)
    return _CONSTANT[len(pads)](flat, value)


def _padded(call: Call, x: fx.Node, sizes: Sequence[int | None], spans: Sequence[int]) -> tuple[fx.Node, list[int]]:
    """The input after what padding a convolution cannot do itself, and the padding left for the convolution."""
    op, none = call.op, [0] * len(spans)
    strides = _tuple(op.strides, len(spans))
    if op.padding == "causal":
        return call.module(lambda: _constant_pad([(spans[0] - 1, 0)]), x, suffix="_pad"), none
    pads = same_pads(sizes, spans, strides) if op.padding == "same" else [(0, 0)] * len(spans)
    if pads is None:
        return call.module(lambda: SamePad(spans, strides), x, suffix="_pad"), none
    if all(a == b for a, b in pads):
        return x, [a for a, _ in pads]
    return call.module(lambda: _constant_pad(pads), x, suffix="_pad"), none


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _spans(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]


def _depthwise(op: Any, kernel: Any, bias: Any, padding: list[int]) -> nn.Module:
    """Keras keeps [..., in, multiplier]; torch wants [in * multiplier, 1, ...] with the groups together."""
    w, rank = weight(kernel), len(padding)
    size, channels, many = w.shape[:rank], w.shape[rank], w.shape[rank + 1]
    conv = _CONV[rank](
        channels, channels * many, tuple(size), stride=_tuple(op.strides, rank), padding=padding,
        dilation=_tuple(op.dilation_rate, rank), groups=channels, bias=bias is not None, dtype=w.dtype,
    )  # fmt: skip
    biases = {} if bias is None else {"bias": weight(bias)}
    return fill_(conv, weight=w.permute(rank, rank + 1, *range(rank)), **biases)


def _dense_conv(op: Any, kernel: Any, bias: Any, padding: list[int], stride: Any, dilation: Any, groups: int) -> Any:
    w, rank = weight(kernel), len(padding)
    conv = _CONV[rank](
        w.shape[rank] * groups, w.shape[rank + 1], tuple(w.shape[:rank]), stride=stride, padding=padding,
        dilation=dilation, groups=groups, bias=bias is not None, dtype=w.dtype,
    )  # fmt: skip
    biases = {} if bias is None else {"bias": weight(bias)}
    return fill_(conv, weight=w.permute(rank + 1, rank, *range(rank)), **biases)


@layer("Conv1D", "Conv2D", "Conv3D")
def convolution(call: Call) -> Any:
    """nn.Conv, with a pad before it where "same" is uneven."""
    op, rank = call.op, call.op.rank
    x, wrap, sizes = call.image(call.x)
    stride, dilation = _tuple(op.strides, rank), _tuple(op.dilation_rate, rank)
    x, padding = _padded(call, x, sizes, _spans(op.kernel_size, dilation))
    make = lambda: _dense_conv(op, op.kernel, op.bias, padding, stride, dilation, op.groups)  # noqa: E731
    return call.activated(wrap(call.module(make, x)), op.activation)


@layer("DepthwiseConv1D", "DepthwiseConv2D")
def depthwise(call: Call) -> Any:
    """nn.Conv with one group for each channel."""
    op = call.op
    x, wrap, sizes = call.image(call.x)
    x, padding = _padded(call, x, sizes, _spans(op.kernel_size, _tuple(op.dilation_rate, op.rank)))
    y = call.module(lambda: _depthwise(op, op.kernel, op.bias, padding), x)
    return call.activated(wrap(y), op.activation)


@layer("SeparableConv1D", "SeparableConv2D")
def separable(call: Call) -> Any:
    """A depthwise convolution and a 1x1 one."""
    op, rank = call.op, call.op.rank
    x, wrap, sizes = call.image(call.x)
    x, padding = _padded(call, x, sizes, _spans(op.kernel_size, _tuple(op.dilation_rate, rank)))
    x = call.module(lambda: _depthwise(op, op.depthwise_kernel, None, padding), x, suffix="_depthwise")
    y = call.module(lambda: _dense_conv(op, op.pointwise_kernel, op.bias, [0] * rank, 1, 1, 1), x, suffix="_pointwise")
    return call.activated(wrap(y), op.activation)


@layer("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def transposed(call: Call) -> Any:
    """nn.ConvTranspose; its output is cropped as the gradient of TensorFlow's convolution would be."""
    op, rank = call.op, call.op.rank
    x, wrap, _ = call.image(call.x)
    stride, dilation = _tuple(op.strides, rank), _tuple(op.dilation_rate, rank)
    if op.output_padding is not None or getattr(op, "groups", 1) != 1:
        raise NoTranslationError("output_padding or groups")
    ends, more = [], []
    for span, s in zip(_spans(op.kernel_size, dilation), stride, strict=True):
        # The whole output has (n - 1) * s + span places; "same" keeps n * s, "valid" (n - 1) * s + max(span, s).
        extra = span - s if op.padding == "same" else min(span - s, 0)
        more.append(max(-extra, 0))
        ends.append((max(extra, 0) // 2, max(extra, 0) - max(extra, 0) // 2))
    even = all(a == b for a, b in ends)

    def make() -> nn.Module:
        w = weight(op.kernel)
        conv = _TRANSPOSED[rank](
            w.shape[rank + 1], w.shape[rank], tuple(w.shape[:rank]), stride=stride, dilation=dilation,
            padding=[a for a, _ in ends] if even else 0, output_padding=more, bias=op.use_bias, dtype=w.dtype,
        )  # fmt: skip
        fill_(conv, weight=w.permute(rank + 1, rank, *range(rank)))
        if op.use_bias:
            fill_(conv, bias=weight(op.bias))
        return conv if even else CroppedTranspose(conv, ends)

    return call.activated(wrap(call.module(make, x)), op.activation)


@layer("MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D", "AveragePooling3D")
def pool(call: Call) -> Any:
    """nn.MaxPool or nn.AvgPool."""
    op = call.op
    x, wrap, sizes = call.image(call.x)
    rank = len(sizes)
    kernel, stride = _tuple(op.pool_size, rank), _tuple(op.strides or op.pool_size, rank)
    largest = type(op).__name__.startswith("Max")
    kind, fill = (_MAX[rank], float("-inf")) if largest else (_AVERAGE[rank], 0.0)
    uncounted = {} if largest else {"count_include_pad": False}
    if op.padding == "valid":
        return wrap(call.module(lambda: kind(kernel, stride), x))
    pads = same_pads(sizes, kernel, stride)
    uneven = pads is None or any(a != b for a, b in pads)
    # Keras' own torch backend repeats the edge where "same" is uneven and averages over it; no other backend does.
    if uneven and not largest and call.builder.backend == "torch":
        if pads is None:
            raise NoTranslationError("an average over open sizes, which Keras on torch pads in its own way")
        call.builder.notes.append(
            f"{call.name}: Keras on torch averages over repeated edges here, Keras on TensorFlow or JAX over what is "
            "there; converted as Keras on torch computes it"
        )
        edge = tuple(n for pair in reversed(pads) for n in pair)
        return wrap(call.module(lambda: nn.Sequential(_REPEATED[rank](edge), kind(kernel, stride)), x))
    if pads is not None and all(a == b or s > 1 for (a, b), s in zip(pads, stride, strict=True)):
        # Where the end needs one place more, a window that hangs over the edge gives it.
        left = [a for a, _ in pads]
        return wrap(call.module(lambda: kind(kernel, stride, padding=left, ceil_mode=uneven, **uncounted), x))
    pad = SamePad(kernel, stride, fill) if pads is None else _constant_pad(pads, fill)
    if largest:
        return wrap(call.module(lambda: nn.Sequential(pad, kind(kernel, stride)), x))
    return wrap(call.module(lambda: SameAveragePool(pad, kind(kernel, stride)), x))


@layer(
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D",
    "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D",
)  # fmt: skip
def global_pool(call: Call) -> Any:
    """The mean or the largest of all places."""
    op, value = call.op, call.x
    mask = call.mask("mask", 1, value)
    if mask is not None and type(op).__name__ == "GlobalAveragePooling1D":
        if op.data_format == "channels_first" or op.keepdims:
            raise NoTranslationError("a mask with channels_first or keepdims")
        return call.run(masked_mean, value, mask)
    x, wrap, sizes = call.image(value)
    function = torch.amax if type(op).__name__.startswith("GlobalMax") else torch.mean
    y = call.run(function, x, list(range(2, 2 + len(sizes))), keepdim=op.keepdims)
    return wrap(y) if op.keepdims else y


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over the steps [N, T, F] -> [N, F] that the mask [N, T] keeps."""
    kept = mask.to(torch.bool).unsqueeze(-1)
    return torch.where(kept, x, 0.0).sum(1) / kept.to(x.dtype).sum(1)


@layer("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D")
def zero_padding(call: Call) -> Any:
    """nn.ConstantPad."""
    if not hasattr(call.op, "data_format"):
        call.op.data_format = "channels_last"
    x, wrap, sizes = call.image(call.x)
    given = call.op.padding
    pads = [tuple(given)] if len(sizes) == 1 else [tuple(p) for p in given]
    return wrap(call.module(lambda: _constant_pad(pads), x))


@layer("Cropping1D", "Cropping2D", "Cropping3D")
def cropping(call: Call) -> Any:
    """A slice of each dimension."""
    value, given = call.x, call.op.cropping
    crops = [tuple(given)] if value.rank == 3 else [tuple(c) for c in given]
    cut = [slice(a, -b if b else None) for a, b in crops]
    if getattr(call.op, "data_format", "channels_last") == "channels_first":
        return call.run(operator.getitem, value, (slice(None), slice(None), *cut))
    return call.run(operator.getitem, value, (slice(None), *cut))


@layer("UpSampling1D", "UpSampling2D", "UpSampling3D")
def upsampling(call: Call) -> Any:
    """nn.Upsample."""
    op, value = call.op, call.x
    places = value.rank - 2
    interpolation = getattr(op, "interpolation", "nearest")
    if interpolation not in ("nearest", "bilinear"):
        raise NoTranslationError(f"interpolation {interpolation!r}")
    factors = tuple(float(n) for n in _tuple(op.size, places))
    if places == 1:
        return First(call.module(lambda: nn.Upsample(scale_factor=factors), call.first(value)))
    x, wrap, _ = call.image(value)
    return wrap(call.module(lambda: nn.Upsample(scale_factor=factors, mode=interpolation), x))
