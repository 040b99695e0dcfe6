"""Rows of a table that is stored in 4 or 8 bits: gathered as they are stored, and only then made real numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_uint4(packed: Tensor, scales: Tensor, zeros: Tensor, ids: Tensor) -> Tensor:
    """Rows of a 4-bit table, real = (stored - zero) * scale.

    Args:
        packed: uint8 [rows, n / 2], as `pack_uint4` makes it.
        scales: float32 [rows, groups]; a group is n / groups numbers.
        zeros: int8 [rows, groups].
        ids: integers [...].

    Returns:
        float32 [..., n].

    Example:
        >>> from deepseek_r1.ops import pack_uint4
        >>> table = pack_uint4(torch.tensor([[8, 9, 10, 11], [0, 0, 15, 15]]))
        >>> scales, zeros = torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.full((2, 2), 8)
        >>> gather_uint4(table, scales, zeros, torch.tensor([0])).tolist()
        [[0.0, 1.0, 4.0, 6.0]]
    """
    # Bytes are taken apart in floats, exactly: ONNX has no shift of its own kind for every type of integer.
    rows = torch.embedding(packed, ids).to(torch.float32)
    right = torch.floor(rows * 0.0625)
    stored = torch.cat([rows - right * 16.0, right], -1)
    scale, zero = torch.embedding(scales, ids), torch.embedding(zeros, ids)
    groups = stored.unflatten(-1, (scales.shape[1], -1))
    real: Tensor = (groups - zero.to(torch.float32).unsqueeze(-1)) * scale.unsqueeze(-1)
    return real.flatten(-2)


def gather_int8(values: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    """Rows of an int8 table with a scale each.

    Args:
        values: int8 [rows, n].
        scales: float32 [rows].
        ids: integers [...].

    Returns:
        float32 [..., n].

    Example:
        >>> table = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
        >>> gather_int8(table, torch.tensor([0.5, 2.0]), torch.tensor([1, 0])).tolist()
        [[6.0, 8.0], [0.5, -1.0]]
    """
    scale = torch.embedding(scales.unsqueeze(-1), ids)
    return torch.embedding(values, ids).to(torch.float32) * scale
