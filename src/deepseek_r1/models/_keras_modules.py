"""Torch modules for what Keras layers do and torch.nn has no layer for. They need no Keras, but for KerasLayer.

Shape suffixes: N batch, T time, S time of keys, F features, H heads, D size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SamePad(nn.Module):
    """Padding as TensorFlow's "same", where sizes are known at run time only: [N, C, ...]; more goes to the end."""

    def __init__(self, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> None:
        super().__init__()
        self.kernel, self.stride, self.value = tuple(kernel), tuple(stride), value

    def forward(self, x: Tensor) -> Tensor:
        """The padded input."""
        pads: list[Any] = []
        for size, kernel, stride in reversed(list(zip(x.shape[2:], self.kernel, self.stride))):
            # (ceil(size / stride) - 1) * stride + kernel - size, without a branch on the size.
            total = torch.sym_max((size + stride - 1) // stride * stride - stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads, value=self.value)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


class SameAveragePool(nn.Module):
    """Average pool after "same" padding, which counts only what was there: [N, C, ...]."""

    def __init__(self, pad: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.pad, self.pool = pad, pool

    def forward(self, x: Tensor) -> Tensor:
        """The averages of what each window holds of the input."""
        return self.pool(self.pad(x)) / self.pool(self.pad(torch.ones_like(x[:1, :1])))


class CroppedTranspose(nn.Module):
    """A transposed convolution without padding, and what is left of its output without the ends."""

    def __init__(self, conv: nn.Module, ends: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.conv = conv
        self.crop = [-n for pair in reversed(ends) for n in pair]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, out, ...]."""
        return F.pad(self.conv(x), self.crop)


class Recurrent(nn.Module):
    """One direction of an LSTM, GRU or plain RNN with Keras' meaning of masks and direction.

    Args:
        rnn: a batch-first layer of torch with one direction.
        backwards: read the sequence from its end; outputs come in that order.
        sequences: give all outputs, else the last one.
        states: give the final states too.
        zero_masked: outputs of masked steps are zero, else those of the step before.
    """

    def __init__(
        self, rnn: nn.RNNBase, *, backwards: bool, sequences: bool, states: bool, zero_masked: bool = False
    ) -> None:
        super().__init__()
        self.rnn = rnn
        self.backwards, self.sequences, self.states, self.zero_masked = backwards, sequences, states, zero_masked

    def forward(self, x_NTF: Tensor, mask_NT: Tensor | None = None, initial: Any = None) -> Any:
        """Outputs [N, T, F] or [N, F], and the states [N, F] where asked for."""
        if self.backwards:
            x_NTF, mask_NT = x_NTF.flip(1), None if mask_NT is None else mask_NT.flip(1)
        state = None
        if initial is not None:
            parts = [s.unsqueeze(0) for s in (initial if isinstance(initial, tuple | list) else [initial])]
            state = tuple(parts) if isinstance(self.rnn, nn.LSTM) else parts[0]
        if mask_NT is None:
            y_NTF, last = self.rnn(x_NTF, state)
            ends = [s[0] for s in last] if isinstance(last, tuple) else [last[0]]
        else:
            y_NTF = self._masked(x_NTF, mask_NT.to(torch.bool), state)
            ends = [y_NTF[:, -1]]
        if self.zero_masked and mask_NT is not None:
            y_NTF = y_NTF * mask_NT.unsqueeze(-1)
        out = y_NTF if self.sequences else y_NTF[:, -1]
        return (out, *ends) if self.states else out

    def _masked(self, x_NTF: Tensor, mask_NT: Tensor, state: Any) -> Tensor:
        """Masked steps are stepped over: the others are moved together, run, and their outputs put back."""
        order_NT = torch.argsort((~mask_NT).to(torch.int64), dim=1, stable=True)
        y_NTF, _ = self.rnn(torch.gather(x_NTF, 1, order_NT.unsqueeze(-1).expand_as(x_NTF)), state)
        seen_NT = mask_NT.to(torch.int64).cumsum(1)
        last_NTF = (seen_NT - 1).clamp(min=0).unsqueeze(-1).expand_as(y_NTF)
        return torch.where(seen_NT.unsqueeze(-1) > 0, torch.gather(y_NTF, 1, last_NTF), 0.0)


class Bidirectional(nn.Module):
    """Two directions and how their outputs are merged ("concat", "sum", "ave", "mul", or None for both)."""

    def __init__(self, ahead: Recurrent, back: Recurrent, merge: str | None) -> None:
        super().__init__()
        self.ahead, self.back, self.merge = ahead, back, merge

    def forward(self, x_NTF: Tensor, mask_NT: Tensor | None = None, initial: Any = None) -> Any:
        """As `Recurrent`; states are those of both directions."""
        half = len(initial) // 2 if initial is not None else 0
        a = self.ahead(x_NTF, mask_NT, initial[:half] if half else None)
        b = self.back(x_NTF, mask_NT, initial[half:] if half else None)
        (y, *ends), (z, *more) = (a, b) if self.ahead.states else ((a,), (b,))
        if self.ahead.sequences:
            z = z.flip(1)
        states = (*ends, *more)
        if self.merge is None:
            return y, z, *states
        if self.merge == "concat":
            out = torch.cat([y, z], -1)
        elif self.merge == "mul":
            out = y * z
        else:
            out = y + z if self.merge == "sum" else (y + z) / 2
        return (out, *states) if states else out


class Attention(nn.Module):
    """Multi-head attention whose heads need not add up to the width of the input.

    Args:
        query, key, value, output: the projections; heads lie beside each other in their outputs.
        heads: number of heads.
        dropout: probability with which a weight is dropped in training.
    """

    def __init__(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear, *, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = query, key, value, output
        self.heads, self.dropout = heads, dropout

    def _split(self, x_NTF: Tensor) -> Tensor:
        return x_NTF.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        query_NTF: Tensor,
        value_NSF: Tensor,
        key_NSF: Tensor | None = None,
        masks: Sequence[Tensor] = (),
        causal: bool = False,
        scores: bool = False,
    ) -> Any:
        """[N, T, F] -> [N, T, F], and the weights [N, H, T, S] where `scores` asks for them.

        Args:
            masks: (True: seen) of a shape that broadcasts with [N, H, T, S].
            causal: a step sees itself and earlier ones only.
        """
        q_NHTD = self._split(self.query(query_NTF))
        k_NHSD = self._split(self.key(value_NSF if key_NSF is None else key_NSF))
        v_NHSD = self._split(self.value(value_NSF))
        mask = None
        for one in masks:
            mask = one if mask is None else mask & one
        plain = not scores and not self.dropout
        if causal and (mask is not None or not plain):
            ones = torch.ones(q_NHTD.shape[2], k_NHSD.shape[2], dtype=torch.bool, device=q_NHTD.device).tril()
            mask = ones if mask is None else mask & ones
        # Not minus infinity: Keras gives a step that sees nothing the mean of all, and no NaN.
        hidden = None if mask is None else torch.where(mask, 0.0, torch.finfo(q_NHTD.dtype).min * 0.7)
        if plain:
            y_NHTD = F.scaled_dot_product_attention(
                q_NHTD, k_NHSD, v_NHSD, attn_mask=hidden, is_causal=causal and mask is None
            )
            return self.output(y_NHTD.transpose(1, 2).flatten(2))
        weights_NHTS = q_NHTD @ k_NHSD.transpose(-1, -2) / q_NHTD.shape[-1] ** 0.5
        weights_NHTS = (weights_NHTS if hidden is None else weights_NHTS + hidden).softmax(-1)
        if mask is not None:
            # Keras' unfused form gives such a step nothing instead.
            weights_NHTS = weights_NHTS * mask
        y_NHTD = F.dropout(weights_NHTS, self.dropout, self.training) @ v_NHSD
        y_NTF = self.output(y_NHTD.transpose(1, 2).flatten(2))
        return (y_NTF, weights_NHTS) if scores else y_NTF


class Einsum(nn.Module):
    """Einstein summation of the input with a weight, and a bias that broadcasts."""

    def __init__(self, equation: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.equation = equation
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """The sums of products that the equation names."""
        y = torch.einsum(self.equation, x, self.weight)
        return y if self.bias is None else y + self.bias


class Slope(nn.Module):
    """A trained slope for negative numbers, one for each place of the input without its batch."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope)

    def forward(self, x: Tensor) -> Tensor:
        """The input where positive, else slope times input."""
        return torch.relu(x) - self.slope * torch.relu(-x)


class Scale(nn.Module):
    """A factor for each place of the last axis."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Factor times input."""
        return x * self.weight


class DropTogether(nn.Module):
    """Dropout of all elements at once that share a place in `shape` (None there: the input's own size)."""

    def __init__(self, rate: float, shape: list[int | None]) -> None:
        super().__init__()
        self.rate, self.shape = rate, shape

    def forward(self, x: Tensor) -> Tensor:
        """The input where kept, over the share of what is kept; unchanged in evaluation."""
        if not self.training or not self.rate:
            return x
        noise = x.new_ones([size if n is None else n for size, n in zip(x.shape, self.shape, strict=True)])
        return x * F.dropout(noise, self.rate)


class KerasLayer(nn.Module):
    """A Keras layer or operation on the torch backend, called as it is; Keras is needed to run it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        call: Any = layer.call
        # A plain operation is no module, and is the same in training.
        self.takes_training = isinstance(layer, nn.Module) and "training" in inspect.signature(call).parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own result."""
        if self.takes_training:
            kwargs["training"] = self.training
        return self.layer(*args, **kwargs)
