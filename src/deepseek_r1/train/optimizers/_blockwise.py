"""Tensors in 8 bits: blocks of 256 numbers, each with its own scale and the dynamic exponent code.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861. Knows nothing
about optimizers.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
#: Decades that the code spans below its largest number.
_DECADES = 7


def dynamic_code(signed: bool) -> Tensor:
    """The 256 numbers of the dynamic exponent code in ascending order, in fp32.

    Zeros ahead of the first set bit count decades down from 1; the bits behind it divide the decade from a tenth to
    its whole evenly, so each decade further down has half as many numbers. With a sign one bit fewer is left.

    Example:
        >>> code = dynamic_code(signed=True)
        >>> len(code), round(float(code[0]), 4), float(code[127]), float(code[255])
        (256, -0.993, 0.0, 1.0)
    """
    positive = []
    for decade in range(_DECADES):
        parts = 2 ** ((6 if signed else 7) - decade)
        width = 0.9 / parts
        positive += [(0.1 + width * (i + 0.5)) * 10.0**-decade for i in range(parts)]
    numbers = [0.0, 1.0, *positive, *(-x for x in positive if signed)]
    return torch.tensor(sorted(numbers), dtype=torch.float64).float()


class BlockCode:
    """Encodes rows of 256 fp32 numbers as 8-bit codes with one scale a row, on one device.

    Args:
        signed: whether numbers may be negative. Without a sign no number above zero becomes zero.

    Example:
        >>> code = BlockCode(signed=False, device=torch.device("cpu"))
        >>> codes, scales = code.encode(torch.full((1, 256), 3.0))
        >>> codes.dtype, code.decode(codes, scales)[0, 0].item()
        (torch.uint8, 3.0)
    """

    def __init__(self, *, signed: bool, device: torch.device) -> None:
        self.signed = signed
        numbers = dynamic_code(signed)
        self._numbers = numbers.to(device)
        self._bounds = ((numbers[1:].double() + numbers[:-1].double()) / 2).float().to(device)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Numbers [rows, 256] in fp32 of codes [rows, 256] and scales [rows]."""
        numbers = self._numbers.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return numbers.mul_(scales.unsqueeze(1))

    def encode(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (uint8, of the numbers' shape) and scales (fp32, one a row): the nearest number of the code."""
        scales = numbers.abs().amax(dim=1) if self.signed else numbers.amax(dim=1)
        # A row of zeros has the scale zero, by which nothing is divided.
        shares = numbers / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        codes = torch.bucketize(shares, self._bounds, out_int32=True)
        if not self.signed:
            codes = torch.maximum(codes, (shares > 0).to(codes.dtype))
        return codes.to(torch.uint8), scales
