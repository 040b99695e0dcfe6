"""Attention as the transformers here compute it: which tokens see which, positions of packed sequences, rotary tables.

Nothing here looks at the values of a tensor, so nothing waits for a GPU. Knows no architecture.

Shape suffixes: B batch, L length, N heads, M heads of keys and values, H size of a head, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import InputError

#: Weights up to which products that fill a GPU badly are joined; a joined weight is a copy at every step.
_NARROW = 1 << 22


def check_tokens(input_ids: Tensor, longest: int, **others: Tensor | None) -> None:
    """Refuse what has not the shape [B, L], or is longer than the model.

    Raises:
        InputError: the message has the shapes.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"input_ids of {shape}: a tensor [batch, length] of token numbers is needed.")
    if input_ids.shape[1] > longest:
        raise InputError(
            f"input_ids of length {input_ids.shape[1]}: this model's positions end at {longest}. Truncate the texts."
        )
    for name, other in others.items():
        if other is not None and other.shape != input_ids.shape:
            raise InputError(
                f"{name} of shape {tuple(other.shape)} with input_ids of shape {tuple(input_ids.shape)}: they must be "
                "equal."
            )


def which_sees_which(attention_mask: Tensor | None, sequence_ids: Tensor | None, *, causal: bool) -> Tensor | None:
    """True where a query (dimension 2) may look at a key (dimension 3): [B, 1, L or 1, L]; None: no mask is needed.

    Without a mask a causal model gives `is_causal` to the attention, whose fast kernels then skip half of the work.
    In a causal model every token sees itself, also where padding stands to the left of a text: a row of which nothing
    can be seen would be no number. Padding (sequence id 0) sees padding, for the same reason.

    Args:
        attention_mask: [B, L], zero (or False) where there is padding.
        sequence_ids: [B, L], which of a row's packed sequences a token belongs to, 0 for padding.

    Example:
        >>> which_sees_which(None, torch.tensor([[1, 1, 2]]), causal=True).int().tolist()
        [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    seen = None
    if attention_mask is not None:
        seen = attention_mask.to(torch.bool)[:, None, None, :]
    if sequence_ids is not None:
        same = (sequence_ids[:, :, None] == sequence_ids[:, None, :]).unsqueeze(1)
        seen = same if seen is None else seen & same
    if seen is None or not causal:
        return seen
    length = seen.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=seen.device)
    return (seen & ones.tril()) | torch.eye(length, dtype=torch.bool, device=seen.device)


def packed_positions(sequence_ids: Tensor) -> Tensor:
    """Positions [B, L] that begin at 0 with each packed sequence.

    Example:
        >>> packed_positions(torch.tensor([[1, 1, 2, 2, 2, 0]])).tolist()
        [[0, 1, 0, 1, 2, 0]]
    """
    places = torch.arange(sequence_ids.shape[1], device=sequence_ids.device)
    begins = torch.ones_like(sequence_ids, dtype=torch.bool)
    begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values


def attend(
    q_BNLH: Tensor,
    k_BMLH: Tensor,
    v_BMLH: Tensor,
    seen: Tensor | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, its heads joined again: [B, L, N * H]. Keys may have fewer heads than queries."""
    groups = q_BNLH.shape[1] // k_BMLH.shape[1]
    if groups > 1 and seen is not None:
        # The memory-efficient kernel, the one that takes masks, knows no groups of heads.
        k_BMLH, v_BMLH = k_BMLH.repeat_interleave(groups, 1), v_BMLH.repeat_interleave(groups, 1)
    y_BNLH = F.scaled_dot_product_attention(
        q_BNLH,
        k_BMLH,
        v_BMLH,
        attn_mask=seen,
        dropout_p=dropout,
        is_causal=causal and seen is None,
        scale=scale,
        enable_gqa=groups > 1 and seen is None,
    )
    return y_BNLH.transpose(1, 2).flatten(2)


def side_by_side(x: Tensor, *parts: nn.Module) -> tuple[Tensor, ...]:
    """What several linear layers make of the same input, [..., D] -> [..., N] each.

    Narrow products do not fill a GPU, so they are done as one with the weights joined. Layers that are more than a
    plain `nn.Linear` (adapters, hooks, quantised ones), are large, or are not being trained, are called one by one.
    """
    joined = [part for part in parts if type(part) is nn.Linear and part.training and not _hooked(part)]
    apart = len(joined) < len(parts) or not x.is_cuda or len({part.bias is None for part in joined}) > 1
    if apart or sum(part.weight.numel() for part in joined) > _NARROW:
        return tuple(part(x) for part in parts)
    weight = torch.cat(tuple(part.weight for part in joined))
    biases = tuple(part.bias for part in joined if part.bias is not None)
    y = F.linear(x, weight, torch.cat(biases) if biases else None)
    return y.split([part.out_features for part in joined], -1)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def split_heads(x_BLD: Tensor, head_size: int) -> Tensor:
    """[B, L, N * H] -> [B, N, L, H]."""
    return x_BLD.unflatten(-1, (-1, head_size)).transpose(1, 2)


class RotaryTable(nn.Module):
    """Cosines and sines of rotary positions (Su et al., "RoFormer", 2021), always in fp32: [P, H / 2] each.

    Args:
        frequencies: makes the angle of one position, [H / 2].
        positions: how many.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, frequencies: Callable[[], Tensor], positions: int) -> None:
        super().__init__()
        self.frequencies, self.positions = frequencies, positions
        self.reset_buffers(torch.empty(0).device)

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the tables, for example after the module was built without memory."""
        # On the CPU first: the same numbers then stand on every device.
        with torch.device("cpu"):
            angles = torch.outer(torch.arange(self.positions, dtype=torch.float32), self.frequencies())
        self.register_buffer("cos", angles.cos().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            # A model converted to bf16 keeps its tables: bf16 has 8 bits, and positions have more.
            self.reset_buffers(self.cos.device)
        return self

    def forward(self, length: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first positions [L, H / 2], or of given ones [B, 1, L, H / 2]."""
        if position_ids is None:
            return self.cos[:length], self.sin[:length]
        return self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)


def rotate(x_BNLH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + H / 2) of each head by their position's angles."""
    cos, sin = cos.to(x_BNLH.dtype), sin.to(x_BNLH.dtype)
    left, right = x_BNLH.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def rotary_frequencies(head_size: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """Angle of one position for each pair of a head, [H / 2].

    Args:
        scaling: None, or {"rope_type": "linear", "factor": f} (positions divided by f), or {"rope_type": "llama3",
            ...}: long waves are stretched by `factor`, short ones kept, those between blended, as published with
            Llama 3.1.
    """
    base = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    if scaling is None:
        return base
    stretched = base / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return stretched
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # How many whole waves fit into the length that the model was first trained on.
    waves = scaling["original_max_position_embeddings"] * base / (2 * math.pi)
    keep = ((waves - low) / (high - low)).clamp(0, 1)
    return keep * base + (1 - keep) * stretched
