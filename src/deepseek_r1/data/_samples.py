"""What is in a ragged sample: which of its fields are token by token, and how long it is. Knows nothing about batches.

A sample is a dict of fields, a tuple of them, or one list (array, tensor) of tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import InputError

#: Fields that are looked at first for a sample's length.
_USUAL = ("input_ids", "tokens", "token_ids", "ids")
#: The only field of a sample that is one list of tokens.
BARE = "input_ids"

Length = Callable[[Any], int] | str | int | None


@dataclass(frozen=True)
class Layout:
    """How samples of a dataset are made.

    Attributes:
        kind: "dict", "tuple" or "bare".
        length: field whose length is the sample's, or a function of the sample.
        tokens: fields with one entry a token.
        others: fields with one value a sample.
    """

    kind: str
    length: Callable[[Any], int] | str | int
    tokens: tuple[str | int, ...]
    others: tuple[str | int, ...]

    def size(self, sample: Any) -> int:
        """The sample's length in tokens.

        Raises:
            InputError: it has not the field that the first samples had.
        """
        if callable(self.length):
            return int(self.length(sample))
        fields = fields_of(sample)
        found = None if self.length not in fields else entries(fields[self.length])
        if found is None:
            raise InputError(
                f"a sample has no tokens in field {self.length!r} (its fields: {list(fields)}), as the first ones had."
            )
        return found


def fields_of(sample: Any) -> dict[Any, Any]:
    """A sample's fields by name or position; one list of tokens is the field "input_ids"."""
    if isinstance(sample, Mapping):
        return dict(sample)
    if entries(sample) is not None:
        return {BARE: sample}
    if isinstance(sample, tuple | list):
        return dict(enumerate(sample))
    raise InputError(
        f"a sample of type {type(sample).__name__} was given; length buckets and packing take a dict or a tuple with "
        "lists, arrays or tensors of tokens in it, or one such list."
    )


def entries(value: Any) -> int | None:
    """Entries along the first dimension of a list of numbers, an array or a tensor; None for anything else.

    Example:
        >>> entries([1, 2]), entries(torch.zeros(3, 2)), entries(7), entries("text"), entries([[1], [2]])
        (2, 3, None, None, None)
    """
    if isinstance(value, Tensor | np.ndarray):
        return None if value.ndim == 0 else int(value.shape[0])
    if isinstance(value, list | tuple) and all(isinstance(v, int | float | np.number) for v in value[:1]):
        return len(value)
    return None


def find_layout(samples: Sequence[Any], length: Length = None) -> Layout:
    """The layout that all these samples have in common.

    Args:
        length: the field with the tokens, or a function that gives a sample's length; None: "input_ids" and the like,
            else the first field with a list.

    Raises:
        InputError: no samples, other fields in some, or no field with a list.

    Example:
        >>> find_layout([{"ids": [1, 2], "label": 0}, {"ids": [3], "label": 1}]).tokens
        ('ids',)
    """
    if not samples:
        raise InputError("there are no samples to look at; the dataset is empty.")
    table = [fields_of(sample) for sample in samples]
    names = list(table[0])
    for fields in table:
        if set(fields) != set(names):
            raise InputError(
                f"samples differ in their fields: {names} and {list(fields)}; every sample needs the same."
            )
    chosen = length if length is not None else _length_field(table[0])
    if not callable(chosen) and chosen not in names:
        raise InputError(f"length={chosen!r} is no field of the samples; they have {names}.")
    kind = "dict" if isinstance(samples[0], Mapping) else "bare" if entries(samples[0]) is not None else "tuple"
    sizes = [chosen(s) if callable(chosen) else entries(f[chosen]) for s, f in zip(samples, table, strict=True)]
    tokens = tuple(
        name for name in names if all(entries(f[name]) == size for f, size in zip(table, sizes, strict=True))
    )
    if not tokens:
        raise InputError(
            f"no field of the samples has one entry a token (fields {names}, lengths {sizes[:3]} of the first samples)."
        )
    return Layout(kind, chosen, tokens, tuple(name for name in names if name not in tokens))


def _length_field(fields: dict[Any, Any]) -> str | int:
    lists = [name for name, value in fields.items() if entries(value) is not None]
    usual = [name for name in _USUAL if name in lists]
    if not lists:
        kinds = {name: type(value).__name__ for name, value in fields.items()}
        raise InputError(
            f"no field of the samples is a list, an array or a tensor of tokens ({kinds}); tokenise the texts first, "
            "or name the field with length=."
        )
    return (usual or lists)[0]


def read_lengths(dataset: Any, length: Length) -> np.ndarray:
    """Every sample's length: from `dataset.lengths` where it has them, else by reading every sample once.

    Raises:
        InputError: `dataset.lengths` has not one entry a sample, or a sample has no length.
    """
    known = getattr(dataset, "lengths", None)
    if known is not None and not callable(known) and length is None:
        found = np.asarray(known, dtype=np.int64).reshape(-1)
        if len(found) != len(dataset):
            raise InputError(f"dataset.lengths has {len(found)} entries, and the dataset has {len(dataset)} samples.")
        return found
    if callable(length):
        return np.fromiter((int(length(dataset[i])) for i in range(len(dataset))), np.int64, len(dataset))
    return np.fromiter(_sizes((dataset[i] for i in range(len(dataset))), length), np.int64, len(dataset))


def _sizes(samples: Iterable[Any], field: str | int | None) -> Iterable[int]:
    layout: Layout | None = None
    for sample in samples:
        layout = layout or find_layout([sample], field)
        yield layout.size(sample)


def distinct(lengths: np.ndarray, most: int = 16) -> list[int]:
    """Indices of up to `most` samples of different lengths, over the whole range; all equal: the first ones.

    Example:
        >>> distinct(np.array([4, 4, 9, 4]))
        [0, 2, 1]
    """
    _, first = np.unique(lengths, return_index=True)
    spread = first[np.linspace(0, len(first) - 1, min(most - 1, len(first))).astype(int)]
    return [*spread.tolist(), *[i for i in range(min(2, len(lengths))) if i not in spread][: most - len(spread)]][:most]


def cut(sample: Any, layout: Layout, length: int) -> Any:
    """The sample with no more than `length` tokens."""
    if layout.kind == "bare":
        return sample[:length]
    fields = fields_of(sample)
    short = {name: value[:length] if name in layout.tokens else value for name, value in fields.items()}
    return short if layout.kind == "dict" else tuple(short.values())


def tensor(value: Any) -> Tensor:
    """A list, an array or a number as a tensor; whole numbers become int64, lists of decimals float32."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    return torch.tensor(value)
