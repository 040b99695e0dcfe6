"""NF4: weights as 4-bit quantiles of a normal distribution, in blocks with a common largest value.

Source: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314: the levels (appendix E), blocks of 64, and the
second quantisation of the blocks' largest values to 8 bits in groups of 256 after their mean was taken off. Of the
8-bit types int8 was taken, one scale a group. Knows no layers.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import InputError
from ._packing import pack_uint4

#: The sixteen levels, ascending; the eighth is zero.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: Weights of a block, and blocks of a group.
NF4_BLOCK, NF4_GROUP = 64, 256
#: Weights that are rounded at a time: the search for levels needs several times their memory.
_AT_ONCE = 2**22


class NF4(NamedTuple):
    """A tensor in NF4. The largest value of block i is `steps[i] * scales[i // 256] + mean`.

    Attributes:
        packed: uint8 [blocks, 32], two neighbours to a byte, the first in the low bits; row-major, padded with zeros.
        steps: int8 [blocks].
        scales: float32 [groups].
        mean: float32 [].
    """

    packed: Tensor
    steps: Tensor
    scales: Tensor
    mean: Tensor


def nf4_shapes(count: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the four tensors of an `NF4` with `count` weights.

    Example:
        >>> nf4_shapes(100)
        ((2, 32), (2,), (1,), ())
    """
    blocks = -(-count // NF4_BLOCK)
    return (blocks, NF4_BLOCK // 2), (blocks,), (-(-blocks // NF4_GROUP),), ()


def quantize_nf4(weight: Tensor) -> NF4:
    """Round a tensor to NF4, each weight to the level that is nearest under the block's stored largest value.

    Args:
        weight: floating, any shape.

    Returns:
        about 4.13 bits for each weight.

    Raises:
        InputError: no floating tensor, an empty one, or values that are not finite.

    Example:
        >>> stored = quantize_nf4(torch.tensor([[0.5, -0.25, 0.0, 0.1]]))
        >>> dequantize_nf4(stored, (1, 4)).round(decimals=2)
        tensor([[ 0.5000, -0.2600,  0.0000,  0.0800]])
    """
    if not weight.is_floating_point() or not weight.numel():
        raise InputError(
            f"quantize_nf4: a floating tensor with values is needed, given {str(weight.dtype).removeprefix('torch.')} "
            f"{list(weight.shape)}."
        )
    flat = weight.detach().reshape(-1)
    blocks = -(-flat.numel() // NF4_BLOCK)
    padded = torch.nn.functional.pad(flat, (0, blocks * NF4_BLOCK - flat.numel())).reshape(blocks, NF4_BLOCK)
    largest = torch.linalg.vector_norm(padded, float("inf"), dim=1, dtype=torch.float32)
    if not bool(torch.isfinite(largest).all()):
        raise InputError("quantize_nf4: the weight has values that are not finite.")
    steps, scales, mean = _second(largest)
    stored = _largest(steps, scales, mean).unsqueeze(1)
    rows = _AT_ONCE // NF4_BLOCK
    packed = [_pack(p, s) for p, s in zip(padded.split(rows), stored.split(rows), strict=True)]
    return NF4(torch.cat(packed), steps, scales, mean)


def _second(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks' largest values as int8 steps from their mean, with a scale for each group."""
    mean = largest.mean()
    blocks = len(largest)
    groups = -(-blocks // NF4_GROUP)
    centred = torch.nn.functional.pad(largest - mean, (0, groups * NF4_GROUP - blocks)).reshape(groups, NF4_GROUP)
    scales = centred.abs().amax(1) / 127
    steps = (centred / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round().clamp(-127, 127)
    return steps.reshape(-1)[:blocks].to(torch.int8), scales, mean


def _largest(steps: Tensor, scales: Tensor, mean: Tensor) -> Tensor:
    """[blocks]. Not below zero: a block of tiny weights beside large ones keeps its signs."""
    scale = scales.repeat_interleave(NF4_GROUP)[: len(steps)]
    return (steps.float() * scale + mean).clamp(min=0)


def _pack(rows: Tensor, largest: Tensor) -> Tensor:
    levels = torch.tensor(NF4_LEVELS, device=rows.device)
    middles = (levels[1:] + levels[:-1]) / 2
    ratio = rows.float() / largest.clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(ratio, middles, out_int32=True).reshape(len(rows), -1, 2)
    # Neighbours share a byte, so that one look-up of a byte gives two weights that lie side by side.
    return pack_uint4(torch.cat([codes[..., 0], codes[..., 1]], -1))


def nf4_table(device: torch.device | str | None = None) -> Tensor:
    """The two weights that each byte stands for before they are scaled, float32 [256, 2].

    Example:
        >>> nf4_table()[0x7F]
        tensor([1., 0.])
    """
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], 1)


def dequantize_nf4(
    stored: NF4, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, table: Tensor | None = None
) -> Tensor:
    """The weights that an `NF4` stands for. On a GPU with Triton one kernel does it, else torch's operators.

    Args:
        shape: of the tensor that was quantised.
        dtype: of the result; the product of level and largest value is made in float32 and rounded once.
        table: what `nf4_table` gives, on the same device; without it a GPU waits for it to be copied there.

    Raises:
        InputError: the tensors do not belong to this shape.
    """
    if tuple(tuple(t.shape) for t in stored) != nf4_shapes(prod(shape)):
        found = [list(t.shape) for t in stored]
        raise InputError(f"dequantize_nf4: tensors of shapes {found} hold no weight of shape {list(shape)}.")
    if table is None:
        table = nf4_table(stored.packed.device)
    if table.is_cuda and not torch.compiler.is_compiling():
        from . import _nf4_triton  # Triton is imported only where there is a GPU

        if not _nf4_triton.problem(table.device):
            return _nf4_triton.dequantize(stored, table, prod(shape), dtype).reshape(shape)
    values = torch.nn.functional.embedding(stored.packed.int(), table)
    values = values.reshape(-1, NF4_BLOCK) * _largest(*stored[1:]).unsqueeze(1)
    return values.reshape(-1)[: prod(shape)].to(dtype).reshape(shape)
