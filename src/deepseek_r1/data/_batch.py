"""What a batch is: the one rule by which the trainer, the quantiser and the optimizer read what a loader yields.

Knows nested tuples, lists and dicts of tensors. Knows nothing about loaders, models or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import InputError

LABEL_KEYS = ("labels", "label")
_RULE = (
    "A batch is (inputs, labels), a dict of keyword inputs with an optional 'labels' entry, or the inputs alone; "
    "several positional inputs go into one tuple: ((a, b), labels)."
)


def unpack_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Split a batch into positional inputs, keyword inputs and labels (None where there are none).

    A tuple or list is `(inputs, labels)` or `(inputs,)`; its inputs may be a tuple or list (several positional
    inputs) or a dict (keyword inputs). A dict is keyword inputs with an optional "labels" or "label" entry.
    A bare tensor is the inputs alone.

    Raises:
        InputError: a tuple of three or more, an empty one, both label keys, or something that is no batch.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> args, kwargs, labels = unpack_batch((x, y))
        >>> len(args), kwargs, labels is y
        (1, {}, True)
        >>> sorted(unpack_batch({"input_ids": x, "labels": y})[1])
        ['input_ids']
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, Mapping):
        return (), *_split_labels(batch)
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise InputError(f"a batch of {len(batch)} parts was given. {_RULE}")
        inputs = batch[0]
        labels = batch[1] if len(batch) == 2 else None
        if isinstance(inputs, Mapping):
            kwargs, own = _split_labels(inputs)
            return (), kwargs, own if labels is None else labels
        return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}, labels
    raise InputError(f"a batch of type {type(batch).__name__} was given. {_RULE}")


def _split_labels(batch: Mapping[Any, Any]) -> tuple[dict[str, Any], Any]:
    found = [key for key in LABEL_KEYS if key in batch]
    if len(found) > 1:
        raise InputError("a batch has both 'labels' and 'label'; keep one of them.")
    kwargs = {key: value for key, value in batch.items() if key not in found}
    if not kwargs:
        raise InputError(f"a batch with no inputs was given (keys: {list(batch)}). {_RULE}")
    return kwargs, batch[found[0]] if found else None


def tensors(part: Any) -> Iterator[Tensor]:
    """Every tensor in a nested part of a batch, in order.

    Example:
        >>> [t.shape[0] for t in tensors({"a": torch.zeros(2), "b": [torch.zeros(3)]})]
        [2, 3]
    """
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from tensors(value)
    elif isinstance(part, tuple | list):
        for value in part:
            yield from tensors(value)


def batch_size(*parts: Any) -> int:
    """The length that all tensors in `parts` share in dimension 0 (tensors without dimensions do not count).

    Raises:
        InputError: the lengths differ, are zero, or there is no tensor.

    Example:
        >>> batch_size({"x": torch.zeros(4, 2)}, torch.zeros(4))
        4
    """
    shapes = [tuple(t.shape) for t in tensors(parts) if t.ndim > 0]
    if not shapes:
        raise InputError(f"there is no tensor in the batch, so its size is unknown. {_RULE}")
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise InputError(
            f"the batch is ragged: its tensors have shapes {shapes}, so their first dimensions differ. Inputs and "
            "labels need one entry per sample; check what the dataset returns, or give the loader a collate_fn."
        )
    size = sizes.pop()
    if size == 0:
        raise InputError(f"the batch has no samples (shapes {shapes}); drop empty batches in the loader.")
    return size


def to_device(part: Any, device: torch.device | str) -> Any:
    """The same nested part with every tensor on `device`; anything that is no tensor is kept.

    Example:
        >>> to_device({"a": [torch.zeros(1), "text"]}, "cpu")
        {'a': [tensor([0.]), 'text']}
    """
    target = torch.device(device)
    return _map(part, lambda t: t.to(target, non_blocking=target.type == "cuda"))


def map_tensors(part: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nested part with `function` of every tensor; anything that is no tensor is kept.

    Example:
        >>> map_tensors({"a": [torch.ones(1), "text"]}, torch.neg)
        {'a': [tensor([-1.]), 'text']}
    """
    return _map(part, function)


def slice_batch(part: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a nested part. Tensors without dimensions are shared by all slices.

    Raises:
        InputError: the part holds something that is neither a tensor nor None, so that it cannot be cut.

    Example:
        >>> slice_batch((torch.arange(4), {"b": torch.arange(4)}), 1, 3)
        (tensor([1, 2]), {'b': tensor([1, 2])})
    """

    def other(value: Any) -> Any:
        if value is None:
            return None
        raise InputError(
            f"a batch with a {type(value).__name__} in it cannot be split; give tensors, or leave micro_batch_size out."
        )

    return _map(part, lambda t: t[start:stop] if t.ndim > 0 else t, other)


def _map(part: Any, on_tensor: Callable[[Tensor], Any], on_other: Callable[[Any], Any] = lambda value: value) -> Any:
    if isinstance(part, Tensor):
        return on_tensor(part)
    if isinstance(part, Mapping):
        return {key: _map(value, on_tensor, on_other) for key, value in part.items()}
    if isinstance(part, tuple | list):
        mapped = [_map(value, on_tensor, on_other) for value in part]
        return mapped if isinstance(part, list) else tuple(mapped)
    return on_other(part)
