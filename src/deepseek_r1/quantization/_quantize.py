"""`quantize`: the one-line door to quantisation; the type of the config chooses the method."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any, overload

import torch

from ..core import ConfigError, InputError, Int4Weight, Registry
from ..data import unpack_batch
from ..graph import Program, capture
from ._modules import quantize_module
from ._ptq import PTQConfig

#: Methods by the name of their config class; each is called with (program, dataset or None, config).
METHODS = Registry(
    "compression method",
    "deepseek_r1.methods",
    {
        "AutoConfig": "deepseek_r1.quantization._auto:quantize_automatically",
        "PTQConfig": "deepseek_r1.quantization._ptq:quantize_program",
    },
)


@overload
def quantize(
    model: Program,
    bits: int | None = ...,
    *,
    dataset: Iterable[Any] | None = ...,
    example_inputs: Any = ...,
    config: Any = ...,
) -> Program: ...


@overload
def quantize(
    model: torch.nn.Module | Program,
    bits: int | None = ...,
    *,
    dataset: Iterable[Any],
    example_inputs: Any = ...,
    config: Any = ...,
) -> Program: ...


@overload
def quantize(
    model: torch.nn.Module | Program,
    bits: int | None = ...,
    *,
    dataset: Iterable[Any] | None = ...,
    example_inputs: Any = ...,
    config: Any = ...,
) -> Program | torch.nn.Module: ...


def quantize(
    model: torch.nn.Module | Program,
    bits: int | None = None,
    *,
    dataset: Iterable[Any] | None = None,
    example_inputs: Any = None,
    config: Any = None,
) -> Program | torch.nn.Module:
    """Quantise a model after training.

    8 bits are those of weights and activations, which need data for their ranges. 4 bits are those of the weights of
    linear layers, in groups of 64 with a scale each, about a seventh of their size; data make them more exact.

    Args:
        model: a module or a captured Program.
        bits: 8 (the default) or 4; instead of `config`.
        dataset: batches for calibration: `(inputs, labels)`, a mapping, or inputs alone. Without it the example
            inputs calibrate ranges of activations, which is enough for a first look only.
        example_inputs: inputs to capture with; by default the first batch.
        config: options of a method, such as `PTQConfig(format=Int4Weight(group_size=32))`.

    Returns:
        A Program that keeps its float parent, so that `optimize` can race both. Of a module without dataset and
        example inputs, if its format needs none: a copy of the module with `nn.QuantizedLinear` layers, which can be
        saved by its state, loaded, captured, and trained around; its `quantization` is the Report.

    Raises:
        ConfigError: other bits, bits and a config, or a config of no known method.
        InputError: no data for a format that needs them, an empty dataset, or nothing that can be quantised.
        CaptureError: the module cannot be captured.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> quantize(net, dataset=[torch.randn(32, 64)]).precision
        'int8'
        >>> quantize(net, bits=4)[0]
        QuantizedLinear(in_features=64, out_features=16, format=int4-weight-g64)
    """
    config = _config(bits, config)
    needs_data = getattr(config, "needs_data", True)
    if dataset is None and example_inputs is None and not isinstance(model, Program) and not needs_data:
        return quantize_module(model, config)
    if dataset is None and needs_data:
        dataset = [_example(model, example_inputs)]
    model, dataset = captured(model, dataset, example_inputs)
    quantised: Program = METHODS.get(type(config).__name__)(model, dataset, config)
    return quantised


def captured(
    model: torch.nn.Module | Program, dataset: Iterable[Any] | None, example_inputs: Any
) -> tuple[Program, Iterable[Any] | None]:
    """The model as a Program, captured with the first batch if there are no example inputs; and the dataset, whole."""
    if isinstance(model, Program):
        return model, dataset
    if example_inputs is None:
        batches = iter(dataset or ())
        first = list(islice(batches, 1))
        if not first:
            raise InputError("quantize(dataset=...): the dataset is empty.")
        args, kwargs, _ = unpack_batch(first[0])
        example_inputs = kwargs or args
        # An iterator gives each batch once; the first calibrates as well.
        dataset = chain(first, batches)
    return capture(model, example_inputs), dataset


def _config(bits: int | None, config: Any) -> Any:
    if config is not None:
        if bits is not None:
            raise ConfigError(f"quantize(bits={bits!r}, config=...): the config says the bits; give one of the two.")
        return config
    if bits not in (None, 8, 4):
        raise ConfigError(f"quantize(bits={bits!r}): 8 or 4 is needed.")
    return PTQConfig(format=Int4Weight()) if bits == 4 else PTQConfig()


def _example(model: torch.nn.Module | Program, example_inputs: Any) -> Any:
    if example_inputs is not None:
        return example_inputs if isinstance(example_inputs, dict) else (example_inputs, None)
    if not isinstance(model, Program):
        raise InputError("quantize needs dataset= (batches like those of the task) to find the ranges of activations.")
    args, kwargs = model.example_inputs
    return kwargs if kwargs else (args, None)
