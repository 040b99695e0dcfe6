"""Norms that do not widen what they give under autocast. Knows no architecture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, except that under autocast its output has autocast's type.

    Autocast computes norms in float32 and leaves their output so, and with it all that is added to it: twice the
    bytes to move and to keep for the backward pass. Here the statistics are float32 as there, and the output is not.

    Example:
        >>> norm = LayerNorm(4)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     norm(torch.randn(2, 4)).dtype
        torch.bfloat16
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if torch.compiler.is_compiling() or input.dtype == torch.float32:
                # Compiled, the wide copy of the input never exists.
                wide = input.float()
                return F.layer_norm(wide, self.normalized_shape, self.weight, self.bias, self.eps).to(dtype)
            # The kernel computes its statistics in float32, and wants all of one type.
            weight = None if self.weight is None else self.weight.to(input.dtype)
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps).to(dtype)
