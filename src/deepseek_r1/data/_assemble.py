"""Samples of different lengths as one batch: padded to one length, or several in a row. Knows no datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..core import InputError
from ._batch import LABEL_KEYS
from ._samples import BARE, Layout, fields_of, tensor

#: What the losses of torch take for "no label here" (their ignore_index).
NO_LABEL = -100


@dataclass(frozen=True)
class Padding:
    """What stands where no sample is.

    Attributes:
        values: by field; labels of whole numbers are -100 and everything else 0 where nothing is given.
        model_shifts: the model compares the label at a token with its prediction at the token before, so in packed
            rows a sample's first label must not count: the token before it is another sample's.
    """

    values: Mapping[str | int, float] = field(default_factory=dict)
    model_shifts: bool = False

    def value(self, name: str | int, dtype: torch.dtype) -> float:
        """The filling of a field."""
        if name in self.values:
            return self.values[name]
        return NO_LABEL if is_label(name) and not dtype.is_floating_point and dtype is not torch.bool else 0


def is_label(name: str | int) -> bool:
    """Whether a field holds labels: "labels" or "label", or the second of a tuple.

    Example:
        >>> is_label("labels"), is_label(1), is_label("input_ids")
        (True, True, False)
    """
    return name in LABEL_KEYS or name == 1


def pad_batch(samples: Sequence[Any], layout: Layout, length: int, padding: Padding) -> Any:
    """One sample a row, padded to `length`; the batch has the samples' form.

    Fields with one value a sample are stacked. A dict gets an "attention_mask" [B, L] (1 for tokens, 0 for padding)
    where it has none.
    """
    table = [fields_of(sample) for sample in samples]
    sizes = [layout.size(sample) for sample in samples]
    batch: dict[Any, Any] = {}
    for name in table[0]:
        if name in layout.tokens:
            parts = [[tensor(fields[name])] for fields in table]
            batch[name] = _rows(parts, name, length, padding)
        else:
            batch[name] = default_collate([fields[name] for fields in table])
    if layout.kind == "bare":
        return batch[BARE]
    if layout.kind == "tuple":
        return tuple(batch.values())
    if "attention_mask" not in batch:
        batch["attention_mask"] = (torch.arange(length) < torch.tensor(sizes)[:, None]).long()
    return batch


def pack_batch(
    rows: Sequence[Sequence[Any]], layout: Layout, length: int, padding: Padding, most_samples: int | None = None
) -> Any:
    """Several samples a row of `length` tokens, with `sequence_ids` and `position_ids` [B, L].

    Fields with one value a sample become [B, S]: the values of a row's samples in order, then padding.

    Args:
        most_samples: S; None: as many as this batch needs, rounded up to a multiple of 8.

    Returns:
        A dict; for samples that are tuples `(dict of inputs, labels)`, with the second field as the labels.

    Raises:
        InputError: a row's samples are longer than it was planned, or a value has no number.
    """
    sizes = [[layout.size(sample) for sample in row] for row in rows]
    _check_rows(sizes, length)
    wide = most_samples or -(-max(len(row) for row in rows) // 8) * 8
    table = [[fields_of(sample) for sample in row] for row in rows]
    batch: dict[Any, Any] = {}
    for name in table[0][0]:
        parts = [[tensor(fields[name]) for fields in row] for row in table]
        if name in layout.tokens:
            batch[name] = _rows(parts, name, length, padding)
        else:
            batch[name] = _rows([[part[None] for part in row] for row in parts], name, wide, padding)
    batch["sequence_ids"], batch["position_ids"] = _sequences(sizes, length)
    if padding.model_shifts:
        for name in (*LABEL_KEYS, 1):
            if name in batch and name in layout.tokens:
                batch[name].masked_fill_(batch["position_ids"] == 0, NO_LABEL)
    return batch if layout.kind != "tuple" else _as_pair(batch, layout)


def _as_pair(batch: dict[Any, Any], layout: Layout) -> Any:
    names = {name: BARE if name == layout.length or name == 0 else f"field_{name}" for name in batch}
    inputs = {names[n] if isinstance(n, int) else n: value for n, value in batch.items() if n != 1}
    return (inputs, batch[1]) if 1 in batch else inputs


def _rows(parts: Sequence[Sequence[Tensor]], name: str | int, length: int, padding: Padding) -> Tensor:
    """One tensor [rows, length, ...] with the parts of each row one after another."""
    first = parts[0][0]
    whole = torch.full((len(parts), length, *first.shape[1:]), padding.value(name, first.dtype), dtype=first.dtype)
    for row, mine in enumerate(parts):
        at = 0
        for part in mine:
            try:
                whole[row, at : at + len(part)] = part
            except RuntimeError as e:
                raise InputError(
                    f"field {name!r}: an entry of shape {tuple(part.shape)} does not fit beside one of "
                    f"{tuple(first.shape)}; all samples need the same form but for their lengths."
                ) from e
            at += len(part)
    return whole


def _sequences(sizes: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    sequence_ids = torch.zeros(len(sizes), length, dtype=torch.long)
    position_ids = torch.zeros(len(sizes), length, dtype=torch.long)
    for row, mine in enumerate(sizes):
        at = 0
        for number, size in enumerate(mine, start=1):
            sequence_ids[row, at : at + size] = number
            position_ids[row, at : at + size] = torch.arange(size)
            at += size
    return sequence_ids, position_ids


def _check_rows(sizes: Sequence[Sequence[int]], length: int) -> None:
    for mine in sizes:
        if sum(mine) > length:
            raise InputError(
                f"the samples of a row have {mine} tokens, together more than max_length={length}: they are longer now "
                "than when the rows were planned. Packing needs a dataset whose samples keep their lengths."
            )
