"""`quantize`: the one-line door to quantisation; the type of the config chooses the method."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch

from ..core import ConfigError, InputError, Registry
from ..data import unpack_batch
from ..graph import Program, capture
from ._static import Int8StaticConfig

#: Methods by the name of their config class; each is called with (program, dataset, config).
METHODS = Registry(
    "compression method",
    "deepseek_r1.methods",
    {"Int8StaticConfig": "deepseek_r1.quantization._static:quantize_static"},
)


def quantize(
    model: torch.nn.Module | Program,
    bits: int = 8,
    *,
    dataset: Iterable[Any] | None = None,
    example_inputs: Any = None,
    config: Any = None,
) -> Program:
    """Quantise a model's weights and activations after training.

    Args:
        model: a module or a captured Program.
        bits: 8. (4 bits come with the weight-only formats.)
        dataset: batches for calibration: `(inputs, labels)`, a mapping, or inputs alone. Without it the example
            inputs calibrate, which is enough for a first look only.
        example_inputs: inputs to capture with; by default the first batch.
        config: options of a method; by default `Int8StaticConfig()`.

    Returns:
        A Program that keeps its float parent, so that `optimize` can race both.

    Raises:
        ConfigError: bits other than 8, or a config of no known method.
        InputError: no data at all, an empty dataset, or nothing that can be quantised.
        CaptureError: the module cannot be captured.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> quantize(net, dataset=[torch.randn(32, 8)]).precision
        'int8'
    """
    if bits != 8:
        raise ConfigError(f"quantize(bits={bits!r}): 8 is available now; 4 comes with the weight-only formats.")
    if dataset is None and example_inputs is None:
        if not isinstance(model, Program):
            raise InputError(
                "quantize needs dataset= (batches like those of the task) to find the ranges of activations."
            )
        args, kwargs = model.example_inputs
        dataset = [kwargs if kwargs else (args, None)]
    elif dataset is None:
        dataset = [example_inputs if isinstance(example_inputs, dict) else (example_inputs, None)]
    if not isinstance(model, Program):
        if example_inputs is None:
            batches = iter(dataset)
            first = list(islice(batches, 1))
            if not first:
                raise InputError("quantize(dataset=...): the dataset is empty.")
            args, kwargs, _ = unpack_batch(first[0])
            example_inputs = kwargs or args
            # An iterator gives each batch once; the first calibrates as well.
            dataset = chain(first, batches)
        model = capture(model, example_inputs)
    config = Int8StaticConfig() if config is None else config
    quantised: Program = METHODS.get(type(config).__name__)(model, dataset, config)
    return quantised
