"""The accelerator, in numpy: 16 x 16 tiles of 16-bit numbers, 32-bit accumulators, 8-bit buffers. Knows no torch.

One sample goes through at a time, because all sizes in the command stream are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

TILE = 16


def product(a: Any, b: Any) -> Any:
    """[m, k] times [k, n] of 16-bit numbers, tile by tile, into 32 bits.

    Example:
        >>> int(product(np.full((1, 40), 3, np.int16), np.full((40, 1), 2, np.int16))[0, 0])
        240
    """
    (rows, inner), columns = a.shape, b.shape[1]
    a, b = _whole_tiles(a.astype(np.int16)), _whole_tiles(b.astype(np.int16))
    result = np.zeros((a.shape[0], b.shape[1]), dtype=np.int32)
    for i in range(0, a.shape[0], TILE):
        for j in range(0, b.shape[1], TILE):
            for k in range(0, a.shape[1], TILE):
                left = a[i : i + TILE, k : k + TILE].astype(np.int32)
                result[i : i + TILE, j : j + TILE] += left @ b[k : k + TILE, j : j + TILE].astype(np.int32)
    assert inner <= a.shape[1], "tiles cover the matrix"
    return result[:rows, :columns]


def _whole_tiles(a: Any) -> Any:
    return np.pad(a, [(0, -size % TILE) for size in a.shape])


class Machine:
    """Runs one command stream.

    Args:
        commands: the stream, the outputs and the number of buffers, as the compiler gives them.
        memory: weights and biases by name.
    """

    def __init__(self, commands: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
        self._stream, self._outputs = commands["stream"], commands["outputs"]
        self._buffers, self._memory = commands["buffers"], memory

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """All outputs in float32 for a batch of any size."""
        rows = len(inputs[0])
        answers = [np.zeros((rows, *out["shape"]), dtype=np.float32) for out in self._outputs]
        for row in range(rows):
            for answer, value in zip(answers, self._one([v[row] for v in inputs]), strict=True):
                answer[row] = value
        return answers

    def _one(self, sample: Sequence[Any]) -> list[Any]:
        buffers: list[Any] = [None] * self._buffers
        for command in self._stream:
            result = getattr(self, f"_{command['command']}")(command, buffers, sample)
            buffers[command["out"]] = _rescaled(result, command["rescale"]) if "rescale" in command else result
        return [_read(buffers[out["buffer"]], out) for out in self._outputs]

    def _load(self, c: Mapping[str, Any], buffers: list[Any], sample: Sequence[Any]) -> Any:
        return np.clip(np.round(sample[c["input"]] / c["scale"]) + c["zero"], -128, 127).astype(np.int8)

    def _conv(self, c: Mapping[str, Any], buffers: list[Any], sample: Sequence[Any]) -> Any:
        weight, bias = self._memory[f"{c['memory']}.weight"], self._memory[f"{c['memory']}.bias"]
        (high, wide), (down, across) = c["padding"], c["stride"]
        x = np.pad(buffers[c["in"]].astype(np.int16) - c["zero_in"], [(0, 0), (high, high), (wide, wide)])
        windows = sliding_window_view(x, weight.shape[2:], axis=(1, 2))[:, ::down, ::across]
        channels, height, width = windows.shape[:3]
        patches = windows.transpose(1, 2, 0, 3, 4).reshape(height * width, -1)
        found = product(patches, weight.reshape(len(weight), -1).T) + bias
        assert channels == weight.shape[1], "the compiler refuses groups"
        return found.T.reshape(len(weight), height, width)

    def _product(self, c: Mapping[str, Any], buffers: list[Any], sample: Sequence[Any]) -> Any:
        weight, bias = self._memory[f"{c['memory']}.weight"], self._memory[f"{c['memory']}.bias"]
        row = buffers[c["in"]].astype(np.int16)[None] - np.int16(c["zero_in"])
        return (product(row, weight.T) + bias)[0]

    def _add(self, c: Mapping[str, Any], buffers: list[Any], sample: Sequence[Any]) -> Any:
        terms = zip(c["in"], c["zero_in"], c["by"], strict=True)
        return sum((buffers[i].astype(np.int32) - zero) * by for i, zero, by in terms)

    def _sum(self, c: Mapping[str, Any], buffers: list[Any], sample: Sequence[Any]) -> Any:
        return (buffers[c["in"]].astype(np.int32) - c["zero_in"]).sum((1, 2), dtype=np.int32, keepdims=c["keep"])


def _rescaled(accumulators: Any, c: Mapping[str, Any]) -> Any:
    """To 8 bits: times a multiplier, shifted right with rounding, clipped. One multiplier, or one for each channel."""
    shape = (-1, *[1] * (accumulators.ndim - 1)) if len(c["multiplier"]) > 1 else ()
    multiplier, shift = (np.asarray(c[k], dtype=np.int64).reshape(shape or 1) for k in ("multiplier", "shift"))
    scaled = (accumulators.astype(np.int64) * multiplier + (1 << (shift - 1))) >> shift
    return np.clip(scaled + c["zero"], c["low"], 127).astype(np.int8)


def _read(stored: Any, out: Mapping[str, Any]) -> Any:
    scale = np.asarray(out["scale"])
    scale = scale.reshape(-1, *[1] * (stored.ndim - 1)) if scale.ndim else scale
    real = (stored.astype(np.float64) - out["zero"]) * scale
    return np.maximum(real, 0) if out.get("relu") else real
