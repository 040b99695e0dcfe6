"""Recurrent operators (LSTM, GRU, RNN) whose length stays a symbol while a graph is made.

torch's own shape functions for them walk over the sequence and so fix its length, although the operator itself runs
at any. Dies when torch gives `aten.lstm.input` and its kin a shape function of their own; seen in torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
_LOCK = threading.RLock()

Tensor = torch.Tensor


def _outputs(x: Tensor, hidden: list[Tensor], two_way: bool, batch_first: bool) -> list[Tensor]:
    """Outputs and last states, by shape alone; x is [length, batch, width] or batch first."""
    first, second = x.shape[0], x.shape[1]
    batch = first if batch_first else second
    out = x.new_empty((first, second, hidden[0].shape[2] * (2 if two_way else 1)))
    return [out, *(x.new_empty((h.shape[0], batch, h.shape[2])) for h in hidden)]


def _lstm(
    x: Tensor, hx: list[Tensor], params: Any, biases: bool, layers: int, dropout: float, train: bool, two_way: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_outputs(x, list(hx), two_way, batch_first))


def _single(
    x: Tensor, hx: Tensor, params: Any, biases: bool, layers: int, dropout: float, train: bool, two_way: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_outputs(x, [hx], two_way, batch_first))


@contextlib.contextmanager
def recurrent_shapes() -> Iterator[None]:
    """Inside, a graph that is being made keeps LSTM, GRU and RNN as one operator of any length."""
    aten = torch.ops.aten
    shapes: dict[Any, Callable[..., Any]] = {
        aten.lstm.input: _lstm, aten.gru.input: _single, aten.rnn_tanh.input: _single, aten.rnn_relu.input: _single,
    }  # fmt: skip
    # The kernels are the process's own: one thread at a time may exchange them.
    with _LOCK:
        before = {op: {key: op.py_kernels.get(key) for key in _KEYS} for op in shapes}
        try:
            for op, shape in shapes.items():
                op.py_kernels.update(dict.fromkeys(_KEYS, shape))
                op._dispatch_cache.clear()
            yield
        finally:
            for op, kernels in before.items():
                for key, kernel in kernels.items():
                    if kernel is None:
                        op.py_kernels.pop(key, None)
                    else:
                        op.py_kernels[key] = kernel
                op._dispatch_cache.clear()
