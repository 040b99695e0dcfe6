"""`DataSplits` and the split into training, validation and test parts. Knows no file formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from ..core import ConfigError, InputError
from ._loader import DSDataLoader

#: Shares of the training, validation and test parts where none are given.
FRACTIONS = (0.7, 0.1, 0.2)
#: More class indices than this are surely something else (years, identifiers).
_MOST_CLASSES = 100_000
#: The label of a token that does not count, as in torch's cross entropy.
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class DataSplits:
    """Three loaders and what is known about what they yield.

    Attributes:
        train: yields shuffled batches `(inputs, labels)`.
        val: for choices made while training; None where the source had none.
        test: for the last measurement only; None where the source had none.
        labels: class names by class index, or None where the labels are quantities.
        input_shape: shape of one sample without the batch, or None where it is not known.
        input_dtype: name of the inputs' torch dtype ("float32"), or None where it is not known.
        preprocessing: steps that turn raw input into model input, in the form of an Artifact's manifest.
        notes: what was done to the data or left out.
    """

    name: str
    train: DataLoader[Any]
    val: DataLoader[Any] | None = None
    test: DataLoader[Any] | None = None
    labels: tuple[str, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    input_dtype: str | None = None
    preprocessing: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def tensors(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All inputs and all labels of "train", "val" or "test", in the dataset's own order.

        Raises:
            InputError: there is no such part, or it is not made of two tensors.
        """
        loader = getattr(self, part, None) if part in ("train", "val", "test") else None
        if loader is None:
            raise InputError(f"{self.name} has no part {part!r}; it has {', '.join(self.parts())}.")
        dataset = loader.dataset
        if not isinstance(dataset, TensorDataset) or len(dataset.tensors) != 2:
            raise InputError(f"the {part} part of {self.name} is no pair of tensors; iterate over its loader instead.")
        return dataset.tensors[0], dataset.tensors[1]

    def parts(self) -> list[str]:
        """The names of the parts that there are."""
        return [p for p in ("train", "val", "test") if getattr(self, p) is not None]


def split(
    x: Any, y: Any, *, seed: int = 0, fractions: tuple[float, float, float] = FRACTIONS
) -> tuple[tuple[Any, Any], tuple[Any, Any], tuple[Any, Any]]:
    """Split arrays or tensors into training, validation and test parts: `(x, y)` three times.

    The same seed gives the same parts on every machine and version. Integer or string labels are classes, and each
    class is spread over the parts by its share; other labels are spread at random.

    Args:
        x, y: array-likes with the same first dimension.
        fractions: shares of training, validation and test; the last two may be 0.

    Raises:
        ConfigError: fractions that are negative or do not add up to 1.
        InputError: lengths that differ, or fewer samples than parts.

    Example:
        >>> train, val, test = split(np.arange(10), np.array([0, 1] * 5), fractions=(0.6, 0.2, 0.2))
        >>> len(train[0]), sorted(val[1].tolist()), sorted(test[1].tolist())
        (6, [0, 1], [0, 1])
    """
    x, y = (v if hasattr(v, "shape") else np.asarray(v) for v in (x, y))
    if len(x) != len(y):
        raise InputError(f"{len(x)} inputs and {len(y)} labels were given; there must be one label for each input.")
    order = _order(np.asarray(y), seed)
    first, second = _cuts(len(order), fractions)
    parts = order[:first], order[first:second], order[second:]
    train, val, test = ((x[np.sort(p)], y[np.sort(p)]) for p in parts)
    return train, val, test


def _order(y: np.ndarray, seed: int) -> np.ndarray:
    """Sample indices in an order of which every stretch has the classes in their shares."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(y))
    if y.ndim != 1 or y.dtype.kind == "f":
        return shuffled
    key = np.empty(len(y))
    for label in np.unique(y):
        members = shuffled[y[shuffled] == label]
        key[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(key[shuffled], kind="stable")]


def _cuts(count: int, fractions: tuple[float, float, float]) -> tuple[int, int]:
    shares = tuple(fractions)
    if len(shares) != 3 or any(not 0 <= f <= 1 for f in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ConfigError(f"fractions={fractions!r}: three shares from 0 to 1 that add up to 1, like (0.7, 0.1, 0.2).")
    if shares[0] == 0:
        raise ConfigError(f"fractions={fractions!r}: the training share must not be 0.")
    if count < sum(f > 0 for f in shares):
        raise InputError(f"{count} samples cannot be split by {fractions}; give more, or set a share to 0.")
    sizes = [max(1, round(count * f)) if f else 0 for f in shares[1:]]
    while sum(sizes) >= count:
        sizes[int(sizes[1] >= sizes[0])] -= 1
    return count - sum(sizes), count - sizes[1]


def class_indices(
    y: np.ndarray, where: str, tokens: tuple[int, ...] | None = None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as class indices (int64) and class names; quantities come back as float32 and None.

    Integers from 0 on are class indices already and stay as they are. Texts, truth values and other integers are
    classes in sorted order. Decimal numbers are quantities. Integers of the shape of token ids are one for each token,
    stay as they are, and have no names.

    Args:
        tokens: the shape [N, T] of inputs that are integers; None: the inputs are something else.

    Raises:
        InputError: a single class, an index beyond any number of classes, a label that is not a finite number, or more
            than one label for each sample or token.
    """
    if y.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(y.reshape(len(y), -1)).all(axis=1))
        if len(bad):
            raise InputError(f"{where}: the label of sample {bad[0]} is not a finite number.")
        return y.astype(np.float32), None
    if y.ndim == 2 and y.shape == tokens and y.dtype.kind in "iu":
        return _token_labels(y.astype(np.int64), where), None
    if y.ndim != 1:
        raise InputError(
            f"{where}: class labels have shape {y.shape}; one label for each sample is needed, or one for each token "
            "where the inputs are token ids [N, T]."
        )
    names, indices = np.unique(y, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"{where}: every label is {names[0].item()!r}; at least two classes are needed.")
    if y.dtype.kind in "iu" and names[0] >= 0:
        if names[-1] >= _MOST_CLASSES:
            raise InputError(
                f"{where}: the label {names[-1]} is no class index. Give texts for codes, decimals for quantities."
            )
        return y.astype(np.int64), tuple(str(i) for i in range(int(names[-1]) + 1))
    return indices.reshape(-1).astype(np.int64), tuple(str(n) for n in names)


def _token_labels(y: np.ndarray, where: str) -> np.ndarray:
    bad = np.argwhere((y < 0) & (y != IGNORED))
    if len(bad):
        row, place = bad[0]
        raise InputError(
            f"{where}: the label of token {place} of sample {row} is {y[row, place]}; token ids from 0 on are needed, "
            f"or {IGNORED} for what does not count."
        )
    return y


def from_arrays(
    name: str,
    parts: Sequence[tuple[Any, Any]],
    *,
    batch_size: int,
    seed: int,
    labels: tuple[str, ...] | None,
    preprocessing: tuple[Mapping[str, Any], ...] = (),
    notes: tuple[str, ...] = (),
) -> DataSplits:
    """A DataSplits over up to three pairs of arrays: training, validation, test; an empty pair is left out."""
    sets = [TensorDataset(*(torch.from_numpy(np.ascontiguousarray(a)) for a in part)) for part in parts]
    train, *rest = sets
    val, test = ([DataLoader(s, batch_size=batch_size) if len(s) else None for s in rest] + [None, None])[:2]
    sample = train.tensors[0]
    return DataSplits(
        name=name,
        train=DSDataLoader(train, batch_size=batch_size, shuffle=True, seed=seed),
        val=val,
        test=test,
        labels=labels,
        input_shape=tuple(sample.shape[1:]),
        input_dtype=str(sample.dtype).removeprefix("torch."),
        preprocessing=preprocessing,
        notes=notes,
    )
