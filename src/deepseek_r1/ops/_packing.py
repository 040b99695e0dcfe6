"""Two 4-bit numbers in a byte: the one place that knows which half is which.

The left half of a row is in the low bits and the right half in the high bits, so that unpacking is two operators and
one concatenation, which every engine has.
"""

from __future__ import annotations

import torch

from ..core import InputError


def pack_uint4(values: torch.Tensor) -> torch.Tensor:
    """Pack integers from 0 to 15, two to a byte.

    Args:
        values: [..., n] of any integer type, n even.

    Returns:
        uint8 [..., n / 2].

    Raises:
        InputError: an odd number in a row, or a value that 4 bits do not hold.

    Example:
        >>> pack_uint4(torch.tensor([[1, 2, 3, 4]])).tolist()
        [[49, 66]]
    """
    if values.shape[-1] % 2:
        raise InputError(f"pack_uint4: rows of an even length are needed, given {tuple(values.shape)}.")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= 15:
        raise InputError(f"pack_uint4: 0 to 15 fit in 4 bits, given {int(values.min())} to {int(values.max())}.")
    left, right = values.to(torch.uint8).chunk(2, -1)
    return left | (right << 4)


def unpack_uint4(packed: torch.Tensor) -> torch.Tensor:
    """What `pack_uint4` was given, as uint8.

    Args:
        packed: uint8 [..., n].

    Returns:
        uint8 [..., 2 n], 0 to 15.

    Example:
        >>> unpack_uint4(torch.tensor([[49, 66]], dtype=torch.uint8)).tolist()
        [[1, 2, 3, 4]]
    """
    return torch.cat([packed & 15, packed >> 4], -1)
