"""Recurrent operators (LSTM, GRU, RNN) whose length stays a symbol while a graph is made.

torch's own shape functions for them walk over the sequence and so fix its length, although the operator itself runs
at any. Dies when torch gives `aten.lstm.input` and its kin a shape function of their own; seen in torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table

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
def recurrent_shapes(*, decomposing: bool = False) -> Iterator[None]:
    """Inside, a graph that is being made keeps LSTM, GRU and RNN as one operator of any length.

    Args:
        decomposing: also while a graph that exists is broken down into smaller operators (for ONNX). Whoever takes
            torch's table of decompositions inside and keeps it would keep ours.
    """
    aten = torch.ops.aten
    shapes: dict[Any, Callable[..., Any]] = {
        aten.lstm.input: _lstm, aten.gru.input: _single, aten.rnn_tanh.input: _single, aten.rnn_relu.input: _single,
    }  # fmt: skip
    table: dict[Any, Any] = decomposition_table if decomposing else {}
    # The kernels are the process's own: one thread at a time may exchange them.
    with _LOCK:
        stores = [(table, [op for op in shapes if op in table], shapes)]
        stores += [(op.py_kernels, list(_KEYS), dict.fromkeys(_KEYS, shape)) for op, shape in shapes.items()]
        before = [{key: store[key] for key in keys if key in store} for store, keys, _ in stores]
        try:
            for store, keys, ours in stores:
                store.update({key: ours[key] for key in keys})
            _forget(shapes)
            yield
        finally:
            for (store, keys, _), held in zip(stores, before, strict=True):
                for key in keys:
                    store.pop(key, None)
                store.update(held)
            _forget(shapes)


def _forget(operators: Iterable[Any]) -> None:
    for op in operators:
        op._dispatch_cache.clear()
