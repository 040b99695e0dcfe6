"""Linear layers with 8- or 4-bit weights, whose activations become int8 in the call, each row with its own range.

Weights are packed once. The kernels are C++ (`native/`), with paths for AVX-512 VNNI, AVX2 and any processor; where
there is no compiler, torch's own operators compute the same. The layout of packed weights is that of
`native/layout.h`. Knows no layers and no graphs.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
import torch.ao.quantization.fx._decomposed

from ..core import UINT4, InputError
from ..core.formats import GROUP_SIZES
from ._native import native_problem

_q = torch.ops.quantized_decomposed
#: Numbers of the C++ operators' attributes.
FUNCTIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
ISAS = ("any", "portable", "avx2", "avx512")
PANEL = 32
#: The most inputs of an 8-bit layer: their products' sum must fit in 32 bits.
MOST_INPUTS = 65536


def pack_int8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Put int8 weights in the order that `integer_linear` reads.

    Args:
        values: int8 [out, in].
        scales: float32 [out]; a weight is stored * scale.

    Returns:
        uint8, one row.

    Raises:
        InputError: other types or shapes.

    Example:
        >>> packed = pack_int8(torch.tensor([[100, -50]], dtype=torch.int8), torch.tensor([0.01]))
        >>> integer_linear(torch.tensor([[1.0, 3.0]]), packed, torch.zeros(1)).round(decimals=1)
        tensor([[-0.5000]])
    """
    out, inputs = _matrix(values, torch.int8, "pack_int8")
    if scales.shape != (out,) or scales.dtype != torch.float32:
        raise InputError(f"pack_int8: float32 scales [{out}] are needed, given {_about(scales)}.")
    panels = _panels(values, _up(inputs, 32))
    data = _steps(panels).reshape(len(panels), -1).view(torch.uint8)
    sums = panels.sum(2, dtype=torch.int32)
    return _joined(data, _padded(scales, 0.0), sums)


def pack_int4(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Put 4-bit weights in the order that `integer_linear` reads.

    Args:
        values: uint8 [out, in], 0 to 15.
        scales: float32 [out, groups], for groups of 32, 64 or 128 inputs; a weight is (stored - zero) * scale.
        zeros: int8 or uint8 [out, groups], 0 to 15.

    Returns:
        uint8, one row.

    Raises:
        InputError: other types, shapes or values.

    Example:
        >>> weights = torch.full((3, 32), 9, dtype=torch.uint8)
        >>> packed = pack_int4(weights, torch.full((3, 1), 0.5), torch.full((3, 1), 8, dtype=torch.int8))
        >>> integer_linear(torch.ones(1, 32), packed, torch.zeros(3), group_size=32)
        tensor([[16., 16., 16.]])
    """
    out, inputs = _matrix(values, torch.uint8, "pack_int4")
    groups = scales.shape[-1] if scales.ndim == 2 else 0
    size = inputs // groups if groups else 0
    if size * groups != inputs or size not in GROUP_SIZES or scales.dtype != torch.float32 or len(scales) != out:
        raise InputError(
            f"pack_int4: float32 scales [{out}, groups] for groups of {GROUP_SIZES} are needed, given {_about(scales)}"
            f" for {inputs} inputs."
        )
    if zeros.shape != scales.shape or zeros.dtype not in (torch.int8, torch.uint8):
        raise InputError(f"pack_int4: int8 zeros {list(scales.shape)} are needed, given {_about(zeros)}.")
    low, high = UINT4
    for name, tensor in (("values", values), ("zeros", zeros)):
        if tensor.numel() and not low <= int(tensor.min()) <= int(tensor.max()) <= high:
            raise InputError(f"pack_int4: {name} from {low} to {high} are needed.")
    panels = _panels(values, inputs)
    # [panels, groups, pairs of steps, even or odd, 32, 4]
    steps = _steps(panels).reshape(len(panels), groups, size // 8, 2, PANEL, 4)
    nibbles = (steps[:, :, :, 0] | steps[:, :, :, 1] << 4).reshape(len(panels), groups, -1)
    scale, zero = (_padded(t, 0).transpose(1, 2).contiguous() for t in (scales, zeros.to(torch.uint8)))
    data = torch.cat([nibbles, scale.view(torch.uint8)], 2).reshape(len(panels), -1)
    kept = torch.nn.functional.pad(zero.reshape(len(panels), -1), (0, _up(groups * PANEL, 64) - groups * PANEL))
    stored = values.reshape(out, groups, size).sum(2, dtype=torch.int32) - size * zeros.to(torch.int32)
    real = (stored.double() * scales.double()).sum(1).float()
    return _joined(torch.cat([data, kept], 1), _padded(real, 0.0))


def unpack(packed: torch.Tensor, out: int, inputs: int, group_size: int = 0) -> torch.Tensor:
    """The weights that were packed, float32 [out, inputs].

    Args:
        group_size: of 4-bit weights; 0 for 8-bit weights.

    Raises:
        InputError: packed weights of another size.
    """
    panels, wide = _up(out, PANEL) // PANEL, inputs if group_size else _up(inputs, 32)
    if packed.dtype != torch.uint8 or packed.shape != (panels * _panel_bytes(wide, group_size),):
        raise InputError(f"unpack: {_about(packed)} are not the packed weights of {out} outputs and {inputs} inputs.")
    data = packed.reshape(panels, -1)
    if not group_size:
        values = data[:, : wide * PANEL].contiguous().view(torch.int8).reshape(panels, wide // 4, PANEL, 4)
        scales = data[:, wide * PANEL : (wide + 4) * PANEL].contiguous().view(torch.float32).reshape(-1, 1)
        return (values.transpose(1, 2).reshape(panels * PANEL, wide) * scales)[:out, :inputs]
    groups = inputs // group_size
    nibbles = group_size * PANEL // 2
    body = data[:, : groups * (nibbles + 4 * PANEL)].reshape(panels, groups, -1)
    both = body[:, :, :nibbles].reshape(panels, groups, group_size // 8, 1, PANEL, 4)
    steps = torch.cat([both & 15, both >> 4], 3).reshape(panels, groups, group_size // 4, PANEL, 4)
    scales = body[:, :, nibbles:].contiguous().view(torch.float32).transpose(1, 2).unsqueeze(-1)
    zeros = data[:, groups * (nibbles + 4 * PANEL) :][:, : groups * PANEL].reshape(panels, groups, PANEL)
    values = steps.permute(0, 3, 1, 2, 4).reshape(panels, PANEL, groups, group_size)
    real = (values.int() - zeros.transpose(1, 2).unsqueeze(-1)) * scales
    return real.reshape(panels * PANEL, inputs)[:out]


def integer_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, *,
    group_size: int = 0, function: str = "none", isa: str = "any",
) -> torch.Tensor:  # fmt: skip
    """A linear layer on packed weights, activations quantised to int8 row by row, and an activation function.

    The rows' ranges are those of torch's `choose_qparams_per_token_asymmetric`. A row with a value that is not finite
    gives no number.

    Args:
        x: float32 [..., in].
        packed: what `pack_int8` or `pack_int4` gave.
        bias: float32 [out].
        group_size: of 4-bit weights; 0 for 8-bit weights.
        function: "none", "relu", "gelu", "gelu_tanh" or "silu".
        isa: "any" takes the best that the processor has; "avx512" (with VNNI), "avx2" and "portable" are for tests.

    Returns:
        float32 [..., out].

    Raises:
        InputError: types or shapes that do not fit, or instructions that this processor has not.
    """
    for name, value, allowed in (("function", function, FUNCTIONS), ("isa", isa, ISAS)):
        if value not in allowed:
            raise InputError(f"integer_linear({name}={value!r}): one of {', '.join(allowed)} is needed.")
    if problem := native_problem():
        warnings.warn(f"integer_linear runs on torch's operators, many times slower: {problem}", stacklevel=2)
        return _by_torch(x, packed, bias, group_size, function)
    numbers = FUNCTIONS.index(function), ISAS.index(isa)
    operators = torch.ops.dr1
    if group_size:
        return cast(torch.Tensor, operators.int4_dynamic_linear(x, packed, bias, group_size, *numbers))
    return cast(torch.Tensor, operators.int8_dynamic_linear(x, packed, bias, *numbers))


def _by_torch(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, group_size: int, function: str
) -> torch.Tensor:
    weight = unpack(packed, len(bias), x.shape[-1], group_size)
    scale, zero = _q.choose_qparams_per_token_asymmetric(x, torch.int8)
    stored = _q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    rounded = _q.dequantize_per_token(stored, scale, zero, -128, 127, torch.int8, torch.float32)
    return apply_function(torch.nn.functional.linear(rounded, weight, bias), function)


def apply_function(y: torch.Tensor, function: str) -> torch.Tensor:
    """One of `FUNCTIONS`.

    Example:
        >>> apply_function(torch.tensor([-1.0, 2.0]), "relu")
        tensor([0., 2.])
    """
    if function in ("gelu", "gelu_tanh"):
        return torch.nn.functional.gelu(y, approximate="tanh" if function == "gelu_tanh" else "none")
    if function == "relu":
        return torch.relu(y)
    return torch.nn.functional.silu(y) if function == "silu" else y


def _matrix(values: torch.Tensor, dtype: torch.dtype, what: str) -> tuple[int, int]:
    if values.ndim != 2 or values.dtype != dtype or not values.numel():
        raise InputError(f"{what}: {str(dtype).removeprefix('torch.')} [out, in] is needed, given {_about(values)}.")
    if values.shape[1] > MOST_INPUTS and dtype == torch.int8:
        raise InputError(f"{what}: at most {MOST_INPUTS} inputs are possible, given {values.shape[1]}.")
    return int(values.shape[0]), int(values.shape[1])


def _about(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _up(n: int, step: int) -> int:
    return (n + step - 1) // step * step


def _panel_bytes(inputs: int, group_size: int) -> int:
    if not group_size:
        return inputs * PANEL + 8 * PANEL
    groups = inputs // group_size
    return groups * (group_size * PANEL // 2 + 4 * PANEL) + _up(groups * PANEL, 64) + 4 * PANEL


def _panels(values: torch.Tensor, inputs: int) -> torch.Tensor:
    """[panels, 32, inputs], zeros where there are no weights."""
    out, wide = values.shape
    padded = torch.nn.functional.pad(values, (0, inputs - wide, 0, _up(out, PANEL) - out))
    return padded.reshape(-1, PANEL, inputs)


def _steps(panels: torch.Tensor) -> torch.Tensor:
    """[panels, inputs / 4, 32, 4]."""
    return panels.reshape(len(panels), PANEL, -1, 4).transpose(1, 2).contiguous()


def _padded(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """[panels, 32, ...] of what has one entry a channel."""
    missing = _up(len(tensor), PANEL) - len(tensor)
    pads = [0, 0] * (tensor.ndim - 1) + [0, missing]
    return torch.nn.functional.pad(tensor, pads, value=value).reshape(-1, PANEL, *tensor.shape[1:])


def _joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([p.contiguous().view(torch.uint8).reshape(len(p), -1) for p in parts], 1).reshape(-1)
