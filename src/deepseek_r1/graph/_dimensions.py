"""Which dimensions of example inputs vary when nobody says so, and examples that are fit to be captured.

The batch varies, and so does every length: whatever the model does not fix itself. Images keep their height and
width, because engines are faster at one size. Knows shapes and names of inputs, no graph.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import InputError
from ._foreign_nests import described

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

#: Names of inputs with four dimensions that are no images.
_NO_IMAGE = re.compile(
    r"past|cache|state|hidden|mem|mask|bias|attn|attention|score|seq|prob|^(keys?|values?|query|queries|[qkv])(_|$)"
)


def named(model: torch.nn.Module, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """The inputs by the names of the parameters of `forward`.

    Raises:
        InputError: they do not fit its parameters.
    """
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as e:
        raise InputError(f"the inputs do not fit {type(model).__name__}.forward: {e}") from e


def by_label(
    model: torch.nn.Module, args: Args, kwargs: Kwargs, describe: Callable[[str, Any], Any]
) -> tuple[Args, Kwargs]:
    """`describe(label, value)` of every flat input, nested as the inputs are.

    The label is the name of the argument, and empty for what stands inside a nest.
    """
    labels: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        labels += [name] * (len(args) - len(labels) if many else 1)

    def nest(label: str, value: Any) -> Any:
        label = label if isinstance(value, torch.Tensor) else ""
        return described(value, lambda v: describe(label, v))

    return tuple(map(nest, labels, args)), {name: nest(name, value) for name, value in kwargs.items()}


def automatic(model: torch.nn.Module, args: Args, kwargs: Kwargs, *, lengths: bool = True) -> tuple[Args, Kwargs]:
    """Which axes may vary, as dicts nested as the inputs are.

    Args:
        lengths: offer every length; otherwise the batch only.
    """
    batch = _batch(args, kwargs)

    def dims(label: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return None
        return dict.fromkeys(_axes(label, value, batch, lengths), torch.export.Dim.AUTO) or None

    named(model, args, kwargs)  # says so if they do not fit
    return by_label(model, args, kwargs, dims)


def _batch(args: Args, kwargs: Kwargs) -> int | None:
    return next(
        (v.shape[0] for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.ndim), None
    )


def _axes(label: str, value: torch.Tensor, batch: int | None, lengths: bool) -> list[int]:
    """The axes that may vary; `label` is the argument's name, empty inside a nest."""
    sizes = value.shape
    if sizes[0] == batch:
        image = value.ndim >= 4 and value.is_floating_point() and label and not _NO_IMAGE.search(label.lower())
        # torch takes a size of 1 for a constant in any case.
        rest = [axis for axis in range(1, value.ndim) if sizes[axis] != 1] if lengths and not image else []
        return [0, *rest]
    if not lengths:
        return []
    if value.ndim == 1:
        return [0] if sizes[0] > 1 else []
    # States of recurrent nets have their layers first.
    return [1] if value.ndim == 3 and sizes[1] == batch else []


def doubled(args: Args, kwargs: Kwargs) -> Iterator[tuple[Args, Kwargs]]:
    """The examples with a batch of 1 made 2, in the ways a model may want it; nothing if the batch is no 1."""
    if _batch(args, kwargs) != 1:
        return

    def twice(axis_of: Callable[[torch.Tensor], int | None]) -> tuple[Args, Kwargs]:
        def change(v: Any) -> Any:
            axis = axis_of(v) if isinstance(v, torch.Tensor) and v.ndim else None
            return v if axis is None else torch.cat([v, v], axis)

        made: tuple[Args, Kwargs] = pytree.tree_map(change, (args, kwargs))
        return made

    yield twice(lambda v: 0 if v.shape[0] == 1 else None)
    yield twice(lambda v: 0 if v.shape[0] == 1 and v.ndim < 3 else 1 if v.ndim == 3 and v.shape[1] == 1 else None)
    yield twice(lambda v: 0 if v.shape[0] == 1 else 1 if v.ndim == 3 and v.shape[1] == 1 else None)


def shrunk(args: Args, kwargs: Kwargs, axes: list[tuple[int, int]]) -> tuple[Args, Kwargs]:
    """The examples with these (flat input, axis) cut to a size of 1."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    for number, axis in axes:
        leaves[number] = leaves[number].narrow(axis, 0, 1)
    small: tuple[Args, Kwargs] = pytree.tree_unflatten(leaves, tree)
    return small
