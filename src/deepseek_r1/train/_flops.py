"""How much of a GPU's arithmetic a run uses (model FLOPs utilisation, MFU): counted work over the data sheet's peak.

Work is what matrix products, convolutions and attention compute in a forward pass, times three for the backward pass;
recomputed activations do not count (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B). Knows modules
and batches.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..data import batch_size, to_device, unpack_batch
from ._rng import preserved_rng

#: Dense peaks by data sheet in TFLOP/s: 16-bit, TF32, fp32. The first name that is a word of the device's decides.
_PEAKS = {
    "B200": (2250.0, 1125.0, 75.0), "H200": (989.0, 494.0, 67.0), "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.0, 494.0, 67.0), "A100": (312.0, 156.0, 19.5), "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3), "V100": (125.0, 15.7, 15.7), "T4": (65.0, 8.1, 8.1), "RTX 4090": (165.0, 82.6, 82.6),
}  # fmt: skip


def peak_flops(device_name: str, precision: str, tf32: bool = False) -> float | None:
    """Peak FLOP/s of a GPU, or None if it is not in the table.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", "bf16"), peak_flops("NVIDIA L40", "bf16")
        (312000000000000.0, None)
    """
    for name, (half, tensor, single) in _PEAKS.items():
        if re.search(rf"\b{name}\b", device_name):
            return 1e12 * (half if precision in ("bf16", "fp16") else tensor if tf32 else single)
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device at a precision, where it is known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision, torch.backends.cuda.matmul.allow_tf32)


def step_flops(model: nn.Module, batch: Any) -> float | None:
    """FLOPs of one training step for each sample of `batch`, or None where the model cannot be run on shapes alone.

    Nothing is computed: the forward pass runs on tensors without data.

    Example:
        >>> step_flops(nn.Linear(8, 4), (torch.zeros(2, 8), torch.zeros(2)))
        192.0
    """
    state = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    try:
        part = unpack_batch(batch)
        args, kwargs, _ = to_device(part, "meta")
        eager = torch.compiler.set_stance("force_eager")
        with eager, preserved_rng(torch.device("cpu")), torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, state, args, kwargs)
    except Exception:  # whatever a model does that needs values: then the count is not known
        return None
    return 3.0 * counter.get_total_flops() / batch_size(part) or None
