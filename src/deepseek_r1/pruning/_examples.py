"""Example inputs for a module that came without any: from the data, the module itself, or tried out by its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..core import InputError
from ..data import batch_size, slice_batch, to_device, unpack_batch
from ..graph import as_inputs, evaluation

#: Samples in the inputs that the graph is captured with and that surgery is checked on.
_SAMPLES = 2
_SIDES = (32, 64, 224, 28, 96, 8, 16, 128, 256)


def examples_for(model: nn.Module, example_inputs: Any, *loaders: Iterable[Any] | None) -> tuple[Any, str]:
    """Inputs for `capture`, and where they come from.

    Raises:
        InputError: there are none and none could be found, or the model fails on those that were given.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example_inputs is not None:
        args, kwargs = as_inputs(example_inputs)
        return _few(args, kwargs, device), "as given"
    for loader in loaders:
        batch = next(iter(loader), None) if loader is not None else None
        if batch is not None:
            args, kwargs, _ = unpack_batch(batch)
            return _few(args, kwargs, device), "the first samples of the data"
    for found, where in _guesses(model):
        if _runs(model, to_device(found, device)):
            return to_device(found, device), where
    raise InputError(
        f"{type(model).__name__} came without data and example inputs, and none could be found that it runs on; give "
        "example_inputs= (a tensor, a tuple of them, or a mapping of keyword inputs) or a dataset."
    )


def _few(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Any:
    args, kwargs = to_device((args, kwargs), device)
    leaves = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.ndim]
    if leaves and len({v.shape[0] for v in leaves}) == 1 and batch_size((args, kwargs)) > _SAMPLES:
        with contextlib.suppress(InputError):
            args, kwargs = slice_batch((args, kwargs), 0, _SAMPLES)
    return kwargs or args


def _guesses(model: nn.Module) -> Iterator[tuple[Any, str]]:
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict):
        yield dict(dummy), "the module's own dummy_inputs"
    first = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear | nn.Embedding)), None)
    generator = torch.Generator().manual_seed(0)
    said = f"random numbers that fit its first layer, {type(first).__name__}"
    if isinstance(first, nn.Conv2d):
        for side in _SIDES:
            shape = (_SAMPLES, first.in_channels, side, side)
            yield (torch.randn(shape, generator=generator),), f"{said}, {side} by {side}"
    elif isinstance(first, nn.Conv1d):
        yield (torch.randn(_SAMPLES, first.in_channels, 256, generator=generator),), said
    elif isinstance(first, nn.Linear):
        yield (torch.randn(_SAMPLES, first.in_features, generator=generator),), said
        yield (torch.randn(_SAMPLES, 16, first.in_features, generator=generator),), said
    elif isinstance(first, nn.Embedding):
        yield (torch.randint(0, first.num_embeddings, (_SAMPLES, 16), generator=generator),), said


def _runs(model: nn.Module, inputs: Any) -> bool:
    args, kwargs = as_inputs(inputs)
    try:
        with evaluation(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception:
        return False
    return True
