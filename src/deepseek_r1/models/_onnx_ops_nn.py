"""ONNX layers: convolutions, pools, normalisations, resizing, recurrent cells.

Each function takes the node's attributes, then the inputs. Semantics after the ONNX operator specification
(opset 7 to 22). Knows nothing about graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._onnx_values import numbers, register, tensor, unsupported

Attrs = Mapping[str, Any]
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _spatial(attrs: Attrs, x: Tensor) -> int:
    if not 3 <= x.dim() <= 5:
        raise unsupported(attrs, f"an input of {x.dim()} dimensions")
    return x.dim() - 2


def _window(attrs: Attrs, x: Tensor, kernel: list[int]) -> tuple[list[int], list[int], list[Any], list[Any]]:
    """Strides, dilations, and the padding before and after each spatial dimension."""
    n = len(kernel)
    strides, dilations = attrs.get("strides") or [1] * n, attrs.get("dilations") or [1] * n
    auto = attrs.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        pads = (attrs.get("pads") if auto == "NOTSET" else None) or [0] * (2 * n)
        return strides, dilations, pads[:n], pads[n:]
    before, after = [], []
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = torch.sym_max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto == "SAME_UPPER" else large)
        after.append(large if auto == "SAME_UPPER" else small)
    return strides, dilations, before, after


def _pad(x: Tensor, before: list[Any], after: list[Any], value: float = 0.0) -> Tensor:
    """Pad the last dimensions; `before` and `after` go from the first of them to the last."""
    pairs = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    return F.pad(x, pairs, value=value)


@register("Conv")
def conv(attrs: Attrs, x: Tensor, w: Tensor, b: Any = None) -> Tensor:
    """Convolution in one to three dimensions."""
    n = _spatial(attrs, x)
    strides, dilations, before, after = _window(attrs, x, list(w.shape[2:]))
    if list(before) != list(after):
        x, before = _pad(x, before, after), [0] * n
    b = None if b is None else tensor(b, x, x.dtype)
    return _CONV[n](x, w, b, strides, before, dilations, attrs.get("group", 1))


@register("ConvTranspose")
def conv_transpose(attrs: Attrs, x: Tensor, w: Tensor, b: Any = None) -> Tensor:
    """Transposed convolution; uneven padding is cut off afterwards."""
    n = _spatial(attrs, x)
    if attrs.get("output_shape") or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise unsupported(attrs, "output_shape or automatic padding")
    strides, dilations, before, after = _window(attrs, x, list(w.shape[2:]))
    extra = attrs.get("output_padding") or [0] * n
    b = None if b is None else tensor(b, x, x.dtype)
    same = list(before) == list(after)
    padding = before if same else [0] * n
    y = _CONV_TRANSPOSE[n](x, w, b, strides, padding, extra, attrs.get("group", 1), dilations)
    return y if same else _pad(y, [-p for p in before], [-p for p in after])


@register("MaxPool")
def max_pool(attrs: Attrs, x: Tensor) -> Tensor:
    """Maximum of each window; padding never wins."""
    n, kernel = _spatial(attrs, x), attrs["kernel_shape"]
    if attrs["outputs"] > 1:
        raise unsupported(attrs, "the output Indices")
    strides, dilations, before, after = _window(attrs, x, kernel)
    # torch refuses a padding of more than half the kernel, and needs it even on both sides.
    if list(before) != list(after) or any(2 * p > k for p, k in zip(before, kernel, strict=True)):
        x, before = _pad(x, before, after, -torch.inf), [0] * n
    return _MAX_POOL[n](x, kernel, strides, before, dilations, bool(attrs.get("ceil_mode", 0)))


@register("AveragePool")
def average_pool(attrs: Attrs, x: Tensor) -> Tensor:
    """Mean of each window, the padding counted or not."""
    n, kernel = _spatial(attrs, x), attrs["kernel_shape"]
    strides, dilations, before, after = _window(attrs, x, kernel)
    if any(d != 1 for d in dilations):
        raise unsupported(attrs, "dilation in AveragePool")
    ceil, count = bool(attrs.get("ceil_mode", 0)), bool(attrs.get("count_include_pad", 0))
    if list(before) == list(after) and all(2 * p <= k for p, k in zip(before, kernel, strict=True)):
        return _AVG_POOL[n](x, kernel, strides, before, ceil, count)
    y = _AVG_POOL[n](_pad(x, before, after), kernel, strides, 0, ceil, True)
    if count:
        return y
    return y / _AVG_POOL[n](_pad(torch.ones_like(x), before, after), kernel, strides, 0, ceil, True)


@register("GlobalAveragePool", "GlobalMaxPool")
def global_pool(attrs: Attrs, x: Tensor) -> Tensor:
    """Mean or maximum over all spatial dimensions, which stay with size 1."""
    dims = list(range(2, x.dim()))
    return x.mean(dims, keepdim=True) if attrs["op"] == "GlobalAveragePool" else x.amax(dims, keepdim=True)


@register("BatchNormalization")
def batch_norm(attrs: Attrs, x: Tensor, scale: Any, bias: Any, mean: Any, var: Any) -> Tensor:
    """Normalisation with the stored statistics."""
    if attrs.get("training_mode") or attrs["outputs"] > 1:
        raise unsupported(attrs, "BatchNormalization in training mode")
    scale, bias, mean, var = (tensor(v, x, x.dtype) for v in (scale, bias, mean, var))
    return F.batch_norm(x, mean, var, scale, bias, training=False, eps=attrs.get("epsilon", 1e-5))


@register("InstanceNormalization")
def instance_norm(attrs: Attrs, x: Tensor, scale: Any, bias: Any) -> Tensor:
    """Normalisation over the spatial dimensions of each channel of each sample."""
    scale, bias = tensor(scale, x, x.dtype), tensor(bias, x, x.dtype)
    return F.instance_norm(x, weight=scale, bias=bias, eps=attrs.get("epsilon", 1e-5))


@register("GroupNormalization")
def group_norm(attrs: Attrs, x: Tensor, scale: Any, bias: Any) -> Tensor:
    """Normalisation over groups of channels; before opset 21 scale and bias are per group."""
    groups = attrs["num_groups"]
    scale, bias = tensor(scale, x, x.dtype), tensor(bias, x, x.dtype)
    if attrs["opset"] < 21:
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, eps=attrs.get("epsilon", 1e-5))


@register("LayerNormalization", "RMSNormalization")
def layer_norm(attrs: Attrs, x: Tensor, scale: Any, bias: Any = None) -> Tensor:
    """Normalisation over the dimensions from `axis` on."""
    if attrs["outputs"] > 1:
        raise unsupported(attrs, "the outputs Mean and InvStdDev")
    shape, eps = list(x.shape[attrs.get("axis", -1) :]), attrs.get("epsilon", 1e-5)
    scale = tensor(scale, x, x.dtype)
    if list(scale.shape) != shape:
        scale = scale.expand(shape)
    if attrs["op"] == "RMSNormalization":
        return F.rms_norm(x, shape, scale, eps)
    bias = None if bias is None else tensor(bias, x, x.dtype).expand(shape)
    return F.layer_norm(x, shape, scale, bias, eps)


@register("LRN")
def local_response_norm(attrs: Attrs, x: Tensor) -> Tensor:
    """Local response normalisation over channels."""
    if attrs["size"] % 2 == 0:
        raise unsupported(attrs, "LRN of even size")
    return F.local_response_norm(
        x, attrs["size"], attrs.get("alpha", 1e-4), attrs.get("beta", 0.75), attrs.get("bias", 1.0)
    )


@register("Dropout")
def dropout(attrs: Attrs, x: Tensor, ratio: Any = None, training: Any = None) -> Tensor:
    """The identity: a loaded graph is one for inference."""
    if attrs["outputs"] > 1:
        raise unsupported(attrs, "the output mask")
    if training and training != [False]:
        raise unsupported(attrs, "Dropout in training mode")
    return x


@register("Resize", "Upsample")
def resize(attrs: Attrs, x: Tensor, *more: Any) -> Tensor:
    """Nearest, linear or cubic interpolation of the spatial dimensions."""
    scales, sizes = _resize_targets(attrs, x, list(more))
    n, mode = x.dim() - 2, attrs.get("mode", "nearest")
    old = attrs["op"] == "Upsample" or attrs["opset"] < 11
    way = "asymmetric" if old else attrs.get("coordinate_transformation_mode", "half_pixel")
    if (
        attrs.get("antialias")
        or attrs.get("exclude_outside")
        or attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise unsupported(attrs, "antialias, exclude_outside or an aspect-ratio policy in Resize")
    target: dict[str, Any] = {"size": sizes} if scales is None else {"scale_factor": scales}
    if mode == "nearest":
        rounding = "floor" if old else attrs.get("nearest_mode", "round_prefer_floor")
        if way == "asymmetric" and rounding == "floor":
            return F.interpolate(x, mode="nearest", **target)
        return _nearest(attrs, x, scales, sizes, way, rounding)
    name = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    if (mode, n) not in name or (mode == "cubic" and attrs.get("cubic_coeff_a", -0.75) != -0.75):
        raise unsupported(attrs, f"Resize with mode {mode!r} over {n} dimensions")
    # With align_corners torch's coordinates follow the rounded size, ONNX's follow the scale.
    fraction = scales is not None and way == "align_corners" and any(s != int(s) for s in scales)
    # pytorch_half_pixel is half_pixel but for outputs of size one.
    single = sizes is not None and way == "pytorch_half_pixel" and any(isinstance(s, int) and s == 1 for s in sizes)
    if way not in ("half_pixel", "pytorch_half_pixel", "align_corners") or fraction or single:
        raise unsupported(attrs, f"Resize with mode {mode!r}, coordinates {way!r} and these sizes")
    return F.interpolate(x, mode=name[mode, n], align_corners=way == "align_corners", **target)


def _resize_targets(attrs: Attrs, x: Tensor, more: list[Any]) -> tuple[list[float] | None, list[Any] | None]:
    """Scales, or sizes, of the spatial dimensions."""
    if attrs["op"] == "Upsample":
        scales, sizes = (more[0] if more else attrs["scales"]), None
    elif attrs["opset"] < 11:
        scales, sizes = more[0], None
    else:
        more += [None] * (3 - len(more))
        scales, sizes = (more[1] if more[1] not in (None, []) else None), more[2]
    axes = [a % x.dim() for a in attrs.get("axes") or range(x.dim())]
    given = dict(zip(axes, numbers(sizes if scales is None else scales), strict=True))
    for axis in (0, 1):
        if axis in given and not (given[axis] == 1 if scales is not None else given[axis] == x.shape[axis]):
            raise unsupported(attrs, "Resize of the batch or channel dimension")
    if scales is not None:
        return [float(given.get(d, 1.0)) for d in range(2, x.dim())], None
    return None, [given.get(d, x.shape[d]) for d in range(2, x.dim())]


_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda v: torch.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: torch.floor(v + 0.5),
}


def _nearest(attrs: Attrs, x: Tensor, scales: Any, sizes: Any, way: str, rounding: str) -> Tensor:
    """Nearest neighbour by an index along each dimension, for every coordinate rule."""
    for i in range(x.dim() - 2):
        old = x.shape[i + 2]
        new = sizes[i] if scales is None else torch.sym_int(old * scales[i])
        scale = new / old if scales is None else scales[i]
        out = torch.arange(new, dtype=torch.float32, device=x.device)
        if way == "asymmetric":
            at = out / scale
        elif way == "align_corners":
            at = out * ((old - 1) / (new - 1))
        elif way in ("half_pixel", "pytorch_half_pixel"):
            at = (out + 0.5) / scale - 0.5
        else:
            raise unsupported(attrs, f"Resize with coordinates {way!r}")
        at = _ROUND[rounding](at)
        x = x.index_select(i + 2, at.to(torch.int64).clamp(0, old - 1))
    return x


@register("DepthToSpace", "SpaceToDepth")
def depth_space(attrs: Attrs, x: Tensor) -> Tensor:
    """Move blocks between channels and space."""
    block, mode = attrs["blocksize"], attrs.get("mode", "DCR")
    n, c, h, w = x.shape
    if attrs["op"] == "SpaceToDepth":
        if mode != "DCR":
            raise unsupported(attrs, f"mode {mode} in SpaceToDepth")
        y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return y.reshape(n, c * block * block, h // block, w // block)
    if mode == "CRD":
        return F.pixel_shuffle(x, block)
    y = x.reshape(n, block, block, c // (block * block), h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // (block * block), h * block, w * block)


#: Order of the gates in torch's weights, as positions in ONNX's.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}


@register("LSTM", "GRU", "RNN")
def recurrent(
    attrs: Attrs, x: Tensor, w: Tensor, r: Tensor, b: Any = None, lengths: Any = None, h0: Any = None,
    c0: Any = None, peepholes: Any = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """One recurrent layer, one or both ways: X [T, N, I] -> Y [T, directions, N, H], Y_h [directions, N, H]."""
    kind, hidden = attrs["op"], attrs["hidden_size"]
    both = attrs.get("direction", "forward") == "bidirectional"
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[kind]
    odd = {
        "direction 'reverse'": attrs.get("direction") == "reverse",
        "sequence lengths": lengths is not None,
        "peepholes": peepholes is not None,
        "layout 1": bool(attrs.get("layout")),
        "clipping": "clip" in attrs,
        "other activations": attrs.get("activations", usual * (1 + both)) != usual * (1 + both),
        "linear_before_reset = 0": kind == "GRU" and not attrs.get("linear_before_reset"),
    }
    for what, present in odd.items():
        if present:
            raise unsupported(attrs, f"{what} in {kind}")
    directions, gates = 1 + both, _GATES[kind]
    if h0 is None:
        h0 = x.new_zeros(directions, x.shape[1], hidden)
    if c0 is None:
        c0 = torch.zeros_like(h0)
    weights: list[Tensor] = []
    for d in range(directions):
        parts = [w[d], r[d]] + ([] if b is None else [b[d, : len(gates) * hidden], b[d, len(gates) * hidden :]])
        weights += [torch.cat([p[g * hidden : (g + 1) * hidden] for g in gates]) for p in parts]
    state = (h0, c0) if kind == "LSTM" else h0
    run: Any = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh}[kind]
    y, *final = run(x, state, weights, b is not None, 1, 0.0, False, both, False)
    steps, batch = x.shape[0], x.shape[1]
    y = y.reshape(steps, batch, directions, hidden).transpose(1, 2)
    return y if attrs["outputs"] == 1 else (y, *final)
