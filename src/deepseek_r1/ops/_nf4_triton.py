"""NF4 weights made dense by one Triton kernel, without the temporary tensors of the form in torch's operators.

Imported only for tensors on a CUDA device. Knows the layout of the four tensors and nothing of how they were made.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BYTES = 1024

if triton is not None:

    @triton.jit
    def _kernel(packed, steps, scales, mean, table, out, half, count, BYTES: tl.constexpr):  # type: ignore
        byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
        inside = byte < half
        both = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
        block = byte // 32
        step = tl.load(steps + block, mask=inside, other=0).to(tl.float32)
        scale = tl.load(scales + block // 256, mask=inside, other=0.0)
        largest = tl.maximum(step * scale + tl.load(mean), 0.0)
        low = tl.load(table + 2 * both) * largest
        high = tl.load(table + 2 * both + 1) * largest
        value = tl.interleave(low, high)
        place = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


def dequantize(stored: tuple[Tensor, Tensor, Tensor, Tensor], table: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` weights of an `NF4`, [count].

    Args:
        table: float32 [256, 2], the weights of each byte, on the device.
    """
    out = torch.empty(count, dtype=dtype, device=table.device)
    half = stored[0].numel()
    with torch.cuda.device(out.device):
        _kernel[(-(-half // _BYTES),)](*stored, table, out, half, count, BYTES=_BYTES)
    return out


@cache
def problem(device: torch.device) -> str:
    """Why the kernel cannot be used on a device; empty if it can. Tried once, on a block of every byte."""
    if triton is None:
        return "Triton is not installed"
    packed = torch.arange(256, dtype=torch.uint8, device=device).reshape(8, 32)
    steps = torch.arange(-4, 4, dtype=torch.int8, device=device)
    one: Any = torch.ones(1, device=device), torch.tensor(2.0, device=device)
    table = torch.arange(512.0, device=device).reshape(256, 2)
    try:
        found = dequantize((packed, steps, *one), table, 512, torch.float32)
    except Exception as e:  # Triton's compiler and the driver raise errors of many kinds.
        return f"{type(e).__name__}: {e}"
    expected = table.reshape(8, 64) * (steps.float() + 2).clamp(min=0).unsqueeze(1)
    return "" if torch.equal(found, expected.reshape(-1)) else "its results are wrong"
