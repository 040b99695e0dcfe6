"""Evaluation and prediction over a loader, as plain functions.

They leave the model's modes and the global generators as they were. Knows nothing about training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import InputError
from ..data import batch_size, slice_batch, to_device, unpack_batch
from ._epoch import batches, empty_loader
from ._objective import Objective, default_metrics
from ._rng import loader_state, preserved_rng, set_loader_state
from ._step import autocast
from ._weighted import take_weights, weight_entries

_EXAMPLE_SAMPLES = 8


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; every module gets its own mode back at the end."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextlib.contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device, and afterwards where it was; its parameters stay the same objects."""
    before = next((t.device for t in (*model.parameters(), *model.buffers())), device)
    if before == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    *,
    device: torch.device,
    precision: str = "fp32",
    check: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Mean loss and metrics over a loader, weighted with the batches' sizes.

    Args:
        check: called before each batch; what it raises ends the evaluation.
        metrics: functions of (outputs, labels) that give a number for a batch, or objects with `update(outputs,
            labels)`, `compute()` and `reset()` (in the manner of torchmetrics) for what is no mean over samples.
            None: accuracy for class labels, mean absolute error for floating ones.

    Raises:
        InputError: the loader is empty or fails, a batch is ragged, no default loss fits.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    chosen = dict(metrics) if metrics is not None else None
    for metric in (chosen or {}).values():
        if _stateful(metric):
            metric.reset()  # type: ignore[attr-defined]
    with preserved_rng(device), mode(model, False), torch.inference_mode():
        for batch in batches(loader, 0, device):
            if check is not None:
                check()
            part = unpack_batch(batch)
            size = batch_size(part)
            args, kwargs, labels = to_device(part, device)
            with autocast(device, precision), _named(f"in the batch after {count} samples of the evaluation"):
                loss, output = objective(model, args, kwargs, labels)
            if chosen is None:
                chosen = dict(default_metrics(output, labels))
            _add(sums, "loss", loss, size)
            for name, metric in chosen.items():
                if _stateful(metric):
                    metric.update(output, labels)  # type: ignore[attr-defined]
                else:
                    _add(sums, name, metric(output, labels), size)
            count += size
    if count == 0:
        raise empty_loader(loader)
    result = {name: float(total) / count for name, total in sums.items()}
    result.update({name: float(m.compute()) for name, m in (chosen or {}).items() if _stateful(m)})  # type: ignore[attr-defined]
    return result


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Bad input is told with its place."""
    try:
        yield
    except InputError as e:
        e.add_note(place)
        raise


def _stateful(metric: Any) -> bool:
    return hasattr(metric, "update") and hasattr(metric, "compute") and hasattr(metric, "reset")


def _add(sums: dict[str, Tensor], name: str, value: Any, size: int) -> None:
    # Sums stay on the device, so that no batch waits for the one before.
    number = torch.as_tensor(value).detach().double() * size
    sums[name] = sums[name] + number if name in sums else number


def predict(model: nn.Module, loader: Iterable[Any], *, device: torch.device, precision: str = "fp32") -> Any:
    """The model's outputs for a whole loader, concatenated on the CPU, half precision as fp32.

    Labels in the batches are ignored. An output that is a tuple or dict gives a tuple or dict of tensors.

    Raises:
        InputError: the loader is empty or fails, or outputs cannot be concatenated.
    """
    outputs = []
    with preserved_rng(device), mode(model, False), torch.inference_mode():
        for batch in batches(loader, 0, device):
            args, kwargs, _ = to_device(unpack_batch(batch), device)
            with autocast(device, precision):
                outputs.append(_to_cpu(model(*args, **take_weights(kwargs, weight_entries(model))[0])))
    if not outputs:
        raise empty_loader(loader)
    # Tensors made in inference mode may not be used in training later; the concatenation is made outside it.
    return _concatenate(outputs)


def example_inputs(loader: Any, device: torch.device, no_inputs: Collection[str] = ()) -> Any:
    """A few samples of a loader's first batch in the form `graph.capture` takes, where the loader left them.

    A tensor, a tuple of positional inputs, or a dict of keyword inputs, without those named in `no_inputs`. No
    generator is advanced.
    """
    before = loader_state(loader)
    with preserved_rng(device):
        batch = next(batches(loader, 0, device), None)
    set_loader_state(loader, before)
    if batch is None:
        raise empty_loader(loader)
    args, kwargs, _ = unpack_batch(batch)
    kwargs = {name: value for name, value in kwargs.items() if name not in no_inputs}
    args, kwargs = slice_batch((args, kwargs), 0, min(batch_size((args, kwargs)), _EXAMPLE_SAMPLES))
    if kwargs:
        return kwargs
    return args[0] if len(args) == 1 else args


def _to_cpu(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float().cpu() if output.dtype in (torch.float16, torch.bfloat16) else output.cpu()
    if isinstance(output, Mapping):
        return {key: _to_cpu(value) for key, value in output.items() if value is not None}
    if isinstance(output, tuple | list):
        return tuple(_to_cpu(value) for value in output)
    raise InputError(
        f"the model's output holds a {type(output).__name__}; predict joins tensors, and tuples and dicts of them."
    )


def _concatenate(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {key: _concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_concatenate([part[i] for part in parts]) for i in range(len(first)))
    if first.ndim == 0:
        return torch.stack(parts)
    try:
        return torch.cat(parts)
    except RuntimeError as e:
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        raise InputError(
            f"outputs of different batches cannot be joined: beyond the batch dimension they have the shapes {shapes}; "
            "pad the inputs to one length, or predict batch by batch."
        ) from e
