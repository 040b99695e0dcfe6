"""Keras' recurrent and attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._keras_modules import Attention, Bidirectional, Recurrent
from ._keras_values import Call, NoTranslationError, fill_, layer, weight

#: For each Keras layer: the torch layer, its activation, and the order in which torch wants Keras' gates.
_RECURRENT: dict[str, tuple[Callable[..., nn.RNNBase], tuple[str, ...], tuple[int, ...]]] = {
    "LSTM": (nn.LSTM, ("tanh",), (0, 1, 2, 3)),
    "GRU": (nn.GRU, ("tanh",), (1, 0, 2)),
    "SimpleRNN": (nn.RNN, ("tanh", "relu"), (0,)),
}


def _direction(call: Call, op: Any) -> Recurrent:
    kind = type(op).__name__
    if kind not in _RECURRENT or not type(op).__module__.startswith("keras."):
        raise NoTranslationError(f"{kind} cells")
    make, activations, order = _RECURRENT[kind]
    activation = getattr(op.activation, "__name__", "?")
    gates = getattr(getattr(op, "recurrent_activation", None), "__name__", "sigmoid")
    if activation not in activations or gates != "sigmoid":
        raise NoTranslationError(f"the activations {activation} and {gates}")
    if op.stateful or not getattr(op, "reset_after", True):
        raise NoTranslationError("stateful" if op.stateful else "reset_after=False")
    if op.dropout or op.recurrent_dropout:
        call.builder.notes.append(f"{call.name}: the dropout inside the recurrent layer was left out")
    cell = op.cell
    w, u = weight(cell.kernel), weight(cell.recurrent_kernel)
    special: dict[str, Any] = {"nonlinearity": activation} if kind == "SimpleRNN" else {}
    rnn = make(w.shape[0], op.units, batch_first=True, bias=op.use_bias, dtype=w.dtype, **special)

    def ordered(x: Tensor) -> Tensor:
        parts = x.chunk(len(order), -1)
        return torch.cat([parts[i] for i in order], -1)

    fill_(rnn, weight_ih_l0=ordered(w).T, weight_hh_l0=ordered(u).T)
    if op.use_bias:
        # GRU has a second bias; the others have one, and torch's second one starts at zero.
        bias = weight(cell.bias)
        both = bias if bias.dim() == 2 else torch.stack([bias, torch.zeros_like(bias)])
        fill_(rnn, bias_ih_l0=ordered(both[0]), bias_hh_l0=ordered(both[1]))
    return Recurrent(
        rnn, backwards=op.go_backwards, sequences=op.return_sequences, states=op.return_state,
        zero_masked=op.zero_output_for_mask,
    )  # fmt: skip


def _run(call: Call, make: Any, states: bool, has_cell: bool, parts: int) -> Any:
    mask, initial = call.mask("mask", 2, call.x), call.given("initial_state", 1)
    if mask is not None and states and has_cell:
        raise NoTranslationError("the final states of an LSTM with a mask")
    y = call.module(make, call.x, mask, initial)
    if parts == 1:
        return y
    return tuple(call.run(_part, y, i) for i in range(parts))


def _part(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


@layer("LSTM", "GRU", "SimpleRNN")
def recurrent(call: Call) -> Any:
    """nn.LSTM, nn.GRU or nn.RNN."""
    op = call.op
    cell = type(op).__name__ == "LSTM"
    return _run(call, lambda: _direction(call, op), op.return_state, cell, 1 + op.return_state * (1 + cell))


@layer("Bidirectional")
def bidirectional(call: Call) -> Any:
    """Two directions and their merger."""
    op = call.op
    ahead, back = op.forward_layer, op.backward_layer
    cell = "LSTM" in (type(ahead).__name__, type(back).__name__)
    parts = (2 if op.merge_mode is None else 1) + 2 * op.return_state * (1 + cell)
    return _run(
        call,
        lambda: Bidirectional(_direction(call, ahead), _direction(call, back), op.merge_mode),
        op.return_state, cell, parts,
    )  # fmt: skip


def _projection(dense: Any, inputs: int) -> nn.Linear:
    """A Keras projection between width and heads as one plain linear layer; `inputs` axes of its kernel are summed."""
    w = weight(dense.kernel)
    w = w.reshape(w.shape[:inputs].numel(), -1)
    linear = nn.Linear(w.shape[0], w.shape[1], bias=dense.bias is not None, dtype=w.dtype)
    fill_(linear, weight=w.T)
    return linear if dense.bias is None else fill_(linear, bias=weight(dense.bias))  # type: ignore[return-value]


@layer("MultiHeadAttention")
def multi_head_attention(call: Call) -> Any:
    """Attention with four linear layers."""
    op = call.op
    query, value, key = call.x, call.given("value", 1), call.given("key", 2)
    own = len(weight(op.output_dense.kernel).shape) == 3
    if query.rank != 3 or not own or getattr(op, "_use_gate", False) or getattr(op, "_sliding_window", None):
        raise NoTranslationError("attention over other axes than one of time, gates, or a sliding window")
    masks = []
    for name, place, axis, of in (("query_mask", 3, -1, query), ("value_mask", 4, -2, value), ("key_mask", 5, -2, key)):
        given = call.mask(name, place, of)
        if given is not None:
            masks.append(call.run(mask_of, given, axis))
    given = call.given("attention_mask", 6)
    if given is not None:
        masks.append(call.run(mask_of, given, None))
    scores, causal = bool(call.given("return_attention_scores", 7)), bool(call.given("use_causal_mask", 9))

    def make() -> nn.Module:
        return Attention(
            _projection(op.query_dense, 1), _projection(op.key_dense, 1), _projection(op.value_dense, 1),
            _projection(op.output_dense, 2), heads=op.num_heads, dropout=op.dropout,
        )  # fmt: skip

    y = call.module(make, query, value, key, masks, causal, scores)
    return (call.run(_part, y, 0), call.run(_part, y, 1)) if scores else y


def mask_of(mask: Tensor, axis: int | None) -> Tensor:
    """A mask of steps [N, T], or of pairs of them, so that it broadcasts with [N, H, T, S]."""
    mask = mask.to(torch.bool)
    if axis is not None:
        return mask.unsqueeze(1).unsqueeze(-1) if axis == -1 else mask.unsqueeze(1).unsqueeze(1)
    return mask.unsqueeze(1) if mask.dim() == 3 else mask
