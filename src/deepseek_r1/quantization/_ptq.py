"""Post-training quantisation: every layer of a program in the format that was chosen for it.

Activations of static layers get one quantize/dequantize pair for each consumer: before every quantised operator, and
*behind* an activation function that follows one, so that engines can fuse operator and function into one integer
kernel. Activations of dynamic layers get theirs with a range that is found at each call. Weights are stored as integers
with one dequantize node for each layer.

Sources: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
2018; those of the weights are in `_groups` and `_rounding`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from ..core import (
    INT8_ACTIVATION,
    ConfigError,
    Float32,
    InputError,
    Int4Weight,
    Int8Static,
    Int8Weight,
    LayerFormat,
    Report,
    progress,
)
from ..data import unpack_batch
from ..graph import PASSES, Program, rewrite, simplify
from ..graph.editing import graph_of, own_weights
from ._embeddings import store_tables, tied_layers
from ._groups import METHODS
from ._insert import apply_formats
from ._layers import Layer, find_layers
from ._observe import Ranges, affine
from ._rewrites import BETTER, OPTIONS, rewritten
from ._rounding import Moments, observe_moments
from ._static import range_of, static_plan
from ._trial import Trial
from ._weights import StoredWeight, stored_weight

#: Samples on which ways to quantise are compared, or a batch more.
_COMPARED = 32


@dataclass(frozen=True, kw_only=True)
class PTQConfig:
    """Options of post-training quantisation.

    Attributes:
        format: of every layer that `layers` does not name.
        layers: formats by name of a layer, or by the start of names up to a dot ("encoder.layer.0").
        activation_clip: "minmax"; "mse" (the clipping limit with the smallest squared error); or "auto": "mse", but
            where most layers are linear whichever makes the quantised answers better on calibration data, as the few
            large channels of a transformer may matter more than their share of the squared error.
        weight_clip: "minmax" or "mse" for each output channel of 8-bit weights.
        group_clip: "minmax", "mse" or "hqq" for each group of 4-bit weights; "auto" takes "minmax" where the rounding
            is compensated, which leaves the same error sooner, and "hqq" elsewhere.
        rounding: "nearest"; "compensated" (GPTQ and bias correction, see `_rounding`); or "reconstructed" (that, and
            then improved weight by weight, see `_reconstruct`). The last two need data.
        equalisation: "off"; "weights" or "activations", for convolutions in a row (see `_equalise`); or "auto", which
            tries both and keeps one only if the quantised answers are better on calibration data. Needs data.
        scaling: "off"; "smoothquant" or "awq", for linear layers (see `_scaling`); or "auto", which tries both where
            most layers are linear and activations have 8 bits. Needs data.
        embedding: format of embedding tables, `Int8Weight()` or `Int4Weight()`; None leaves them float. A table that is
            the weight of a quantised layer too is stored once, in that layer's format.
        calibration_batches: at most this many batches of the dataset are used.
        skip: parts of layer names (as in `named_modules`) that stay float.

    Example:
        >>> from deepseek_r1.core import Int4Weight
        >>> PTQConfig(format=Int4Weight(group_size=32), layers={"head": Int8Static()}).format_of("head").name
        'int8-static'
    """

    format: LayerFormat = field(default_factory=Int8Static)
    layers: Mapping[str, LayerFormat] = field(default_factory=dict)
    activation_clip: str = "auto"
    weight_clip: str = "mse"
    group_clip: str = "auto"
    rounding: str = "compensated"
    equalisation: str = "off"
    scaling: str = "auto"
    embedding: LayerFormat | None = None
    calibration_batches: int = 32
    skip: tuple[str, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        allowed = {
            "activation_clip": ("auto", "minmax", "mse"), "weight_clip": ("minmax", "mse"),
            "group_clip": ("auto", *METHODS), "rounding": ("nearest", "compensated", "reconstructed"), **OPTIONS,
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                either = " or ".join(f'"{v}"' for v in values)
                raise ConfigError(f"PTQConfig({name}={getattr(self, name)!r}): {either} is needed.")
        if self.calibration_batches < 1:
            raise ConfigError(f"PTQConfig(calibration_batches={self.calibration_batches}): at least 1 is needed.")
        if isinstance(self.skip, str):
            raise ConfigError(f"PTQConfig(skip={self.skip!r}): a tuple of names is needed: ({self.skip!r},).")
        for name, fmt in {"format": self.format, **self.layers}.items():
            if not isinstance(fmt, LayerFormat):
                raise ConfigError(
                    f"PTQConfig: {name!r} is given {fmt!r}; a layer format such as Int8Static() is needed."
                )

        kept = self.embedding
        if kept is not None and not isinstance(kept, Int8Weight | Int4Weight):
            raise ConfigError(f"PTQConfig(embedding={kept!r}): Int8Weight() or Int4Weight() is needed, or None.")

    def format_of(self, name: str) -> LayerFormat:
        """The format of a layer: that of the longest name which it bears or lies in."""
        parts = name.split(".")
        inside = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.layers[n] for n in inside if n in self.layers), self.format)

    @property
    def needs_data(self) -> bool:
        """Whether some format has ranges of activations that data must tell."""
        return any(fmt.activation == "static" for fmt in (self.format, *self.layers.values()))


def quantize_program(program: Program, dataset: Iterable[Any] | None, config: PTQConfig) -> Program:
    """A program with its layers in the formats of `config`; `parent` of the result is the float program.

    Args:
        dataset: calibrates; None if no format needs it, and then weights are rounded to the nearest.

    Raises:
        InputError: the dataset is empty or does not fit, the program is quantised already, or nothing in it can be.
        ConfigError: a name in `config.layers` is that of no layer.
    """
    batches = [] if dataset is None else calibration_inputs(program, dataset, config.calibration_batches)
    parent = simplified(program)
    rewrites = Report("rewrites")
    base, config = improved(parent, batches, config, rewrites)
    result = replace(_quantised(base, batches, config), parent=parent)
    report = result.report
    if told(rewrites):
        report.sections.append(rewrites)
    report.add(
        "weights", result.parameters_bytes, before=parent.parameters_bytes, unit="bytes",
        how="all parameters and buffers",
    )  # fmt: skip
    report.add("calibration samples", sum(_rows(b) for b in batches), how=f"{len(batches)} batches")
    checked = batches[:1] or [tuple(pytree.tree_leaves(parent.example_inputs))]
    report.add("output SQNR", _sqnr(parent, result, checked), unit="dB", how="against float, first batch")
    if config.rounding != "nearest" and not batches:
        report.note("no data were given: weights were rounded to the nearest instead of in the way that suits the data")
    return result


def told(report: Report) -> bool:
    """Whether a report of rewrites has something to say."""
    return bool(report.rows or report.skipped or report.notes)


def improved(
    parent: Program, batches: list[tuple[Any, ...]], config: PTQConfig, report: Report
) -> tuple[Program, PTQConfig]:
    """The float program with the rewrites that suit its quantisation, and the options with nothing left to "auto".

    Args:
        batches: flat inputs; without any nothing is rewritten.
        report: takes what was done, and what was tried.
    """
    quick = replace(config, rounding="nearest", weight_clip="minmax", group_clip="minmax", embedding=None)
    if config.activation_clip == "auto":
        quick = replace(quick, activation_clip="mse")
    formats = _formats(parent.module(), config, Report(""), parent.name)
    linear = sum(layer.is_linear for layer in formats) > len(formats) / 2 and len(formats) > 1
    tried = linear and any(fmt.activation != "float" for fmt in formats.values())
    options = {name: getattr(config, name) if batches else "off" for name in OPTIONS}
    if not tried and options["scaling"] == "auto":
        options["scaling"] = "off"

    few, others = _parted(batches)
    floats = Trial(graph_of(parent), _no_weights, {})
    wanted = [floats.run({}, leaves) for leaves in others]

    def same(module: GraphModule) -> float:
        answers = Trial(module, _no_weights, {})
        return _decibels((answers.run({}, leaves), exact) for leaves, exact in zip(others, wanted))

    def quality(module: GraphModule, config: PTQConfig) -> float:
        trial, formats = _cheap_trial(module, few, config, parent.name)
        return _decibels((trial.run(formats, leaves), exact) for leaves, exact in zip(others, wanted))

    base, known = rewritten(
        parent, few, options, lambda m: _formats(m, config, Report(""), parent.name), same,
        lambda module: quality(module, quick), report,
    )  # fmt: skip
    clip = quick.activation_clip
    static = any(fmt.activation == "static" for fmt in formats.values())
    if config.activation_clip == "auto" and batches and linear and static:
        found = {"mse": known if known > -math.inf else quality(graph_of(base), quick)}
        found["minmax"] = quality(graph_of(base), replace(quick, activation_clip="minmax"))
        clip = "minmax" if found["minmax"] > found["mse"] - 10 * math.log10(BETTER) else "mse"
        report.note(f"ranges of activations by {clip}: " + ", ".join(f"{n} {db:.1f} dB" for n, db in found.items()))
    return base, replace(config, activation_clip=clip)


def _no_weights(layer: Layer, fmt: LayerFormat) -> StoredWeight:
    raise AssertionError("a trial in float asks for no weights")


def _cheap_trial(
    module: GraphModule, batches: list[tuple[Any, ...]], config: PTQConfig, name: str
) -> tuple[Trial, dict[Layer, LayerFormat]]:
    """The graph in its formats without rewriting it, weights rounded to the nearest, and those formats."""
    formats = _formats(module, config, Report(""), name)
    additions = config.format.activation == "static"
    values = static_plan(module, formats, additions=additions).values
    ranges = Ranges(module, dict.fromkeys(range_of(value) for value in values))
    if values:
        ranges.observe(batches, histogram=config.activation_clip == "mse")
    found = {node: ranges.limits(node, INT8_ACTIVATION, config.activation_clip) for node in ranges.nodes}
    limits = {value: affine(*found[range_of(value)], INT8_ACTIVATION) for value in values}
    weights = {
        layer: stored_weight(layer.weight, fmt, None, clip=config.weight_clip, group_clip=config.group_clip)
        for layer, fmt in formats.items()
        if not isinstance(fmt, Float32)
    }
    return Trial(module, lambda layer, fmt: weights[layer], limits, additions), formats


def _parted(batches: list[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Batches that ranges are taken from, and others to judge by: what fits the first best may not fit others."""
    half = (len(batches) + 1) // 2
    few: list[list[tuple[Any, ...]]] = [[], []]
    for part, source in zip(few, (batches[:half], batches[half:] or batches[:half])):
        for batch in source:
            if sum(_rows(b) for b in part) < _COMPARED:
                part.append(batch)
    return few[0], few[1]


def _quantised(base: Program, batches: list[tuple[Any, ...]], config: PTQConfig) -> Program:
    """A float program in its formats, with a report of the layers."""
    report = Report(f"quantise {base.name}")
    used: list[LayerFormat] = []

    def change(module: GraphModule) -> None:
        formats = _formats(module, config, report, base.name)
        used.extend(fmt for layer, fmt in formats.items() for _ in layer.nodes)
        plan = static_plan(module, formats, additions=config.format.activation == "static")
        origins = {value: range_of(value) for value in plan.values}
        ranges = Ranges(module, dict.fromkeys(origins.values()))
        if plan.values:
            ranges.observe(batches, histogram=config.activation_clip == "mse")
        tied = tied_layers(module, formats)
        moments = moments_of(module, [la for la, fmt in formats.items() if fmt.is_quantised], batches, config)
        apply_formats(
            module, formats, plan,
            lambda layer, fmt: stored_weight(
                layer.weight, fmt, moments.get(layer.nodes[0]), clip=config.weight_clip, group_clip=config.group_clip
            ),
            lambda node: ranges.limits(origins[node], INT8_ACTIVATION, config.activation_clip),
        )  # fmt: skip
        if config.embedding is not None:
            clips = config.weight_clip, config.group_clip
            used.extend(store_tables(module, config.embedding, tied, *clips, config.skip, report))
        for name, count in Counter(str(fmt) for layer, fmt in formats.items() for _ in layer.nodes).items():
            report.add(f"layers in {name}", count, before=0, how="convolutions and linear layers")
        if plan.additions:
            report.add("additions in int8", len(plan.additions), before=0, how="residual additions")

    return precision_of_layers(rewrite(base, change, report=report), used)


def simplified(program: Program) -> Program:
    """The program that formats are put into: simplified as suits quantisation, with weights of its own.

    Raises:
        InputError: the program is not float32.
    """
    if program.precision != "fp32":
        way = "give its float parent" if program.parent is not None else "convert the model first: model.float()"
        raise InputError(f"the program is {program.precision} already, and quantisation starts from fp32; {way}.")
    # Layers that were merged would share one range of activations, and lose accuracy.
    simple = simplify(program, [name for name in PASSES if name != "merge_linears"], strict=False)
    # A snapshot: training the module further must not change half of a quantised program (its biases).
    return rewrite(simple, own_weights, source=None)


def precision_of_layers(program: Program, formats: Iterable[LayerFormat]) -> Program:
    """The program, its precision named after the formats of its layers."""
    widths = frozenset(fmt.weight_bits for fmt in formats)
    return replace(program, precision={frozenset({8}): "int8", frozenset({4}): "int4"}.get(widths, "mixed"))


def calibration_inputs(program: Program, dataset: Iterable[Any], limit: int) -> list[tuple[Any, ...]]:
    """Flat inputs of the first `limit` batches, checked against the program."""
    found: list[tuple[Any, ...]] = []
    for batch in progress.track(dataset, "calibration data", limit):
        args, kwargs, _ = unpack_batch(batch)
        found.append(check_inputs(program, args, kwargs))
        if len(found) >= limit:
            break
    if not found:
        raise InputError("calibration needs at least one batch; the dataset is empty.")
    return found


def check_inputs(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs of a batch, flat.

    Raises:
        InputError: they do not fit the program.
    """
    if misfit := program.misfit(args, kwargs):
        raise InputError(f"calibration: {misfit}")
    return tuple(pytree.tree_leaves((args, kwargs)))


def _formats(module: GraphModule, config: PTQConfig, report: Report, name: str) -> dict[Layer, LayerFormat]:
    """The layers that are not left in float32, with their formats."""
    layers = find_layers(module, config.skip, report)
    known = {layer.name for layer in layers} | {skipped for skipped, _ in report.skipped}
    for given in config.layers:
        if not any(n == given or n.startswith(f"{given}.") for n in known):
            raise ConfigError(f"PTQConfig(layers=...): {given!r} is no layer of {name!r}; there are {sorted(known)}.")
    found: dict[Layer, LayerFormat] = {}
    for layer in layers:
        fmt = config.format_of(layer.name)
        if reason := layer.misfit(fmt):
            report.skip(layer.name, reason)
        elif isinstance(fmt, Float32):
            report.skip(layer.name, "float32 was chosen for it")
        else:
            found[layer] = fmt
    if not found:
        raise InputError(f"nothing in {name!r} can be quantised: {dict(report.skipped)}")
    return found


def moments_of(
    module: GraphModule, layers: Iterable[Layer], batches: list[tuple[Any, ...]], config: PTQConfig
) -> dict[Node, Moments]:
    """What compensated rounding has to know of each layer; nothing if rounding is to the nearest."""
    if config.rounding == "nearest" or not batches:
        return {}
    # What several calls read is rounded to the nearest: compensation, and a bias, suit one.
    single = [layer for layer in layers if len(layer.nodes) == 1]
    moments = observe_moments(module, {layer.nodes[0]: layer.weight for layer in single}, batches)
    for seen in moments.values():
        seen.improved = config.rounding == "reconstructed"
    return moments


def _rows(inputs: tuple[Any, ...]) -> int:
    first = next((v for v in inputs if isinstance(v, torch.Tensor) and v.ndim), None)
    return 1 if first is None else int(first.shape[0])


def _sqnr(parent: Program, result: Program, batches: list[tuple[Any, ...]]) -> float:
    tree = pytree.tree_structure(parent.example_inputs)

    def answers(program: Program, leaves: tuple[Any, ...]) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        with torch.no_grad():
            return pytree.tree_leaves(program(*args, **kwargs))

    return _decibels((answers(result, leaves), answers(parent, leaves)) for leaves in batches)


def _decibels(pairs: Iterable[tuple[list[Any], list[Any]]]) -> float:
    """Signal-to-noise ratio of answers against exact ones, over all their float tensors."""
    signal = noise = 0.0
    for found, exact in pairs:
        for a, b in zip(found, exact):
            if isinstance(b, torch.Tensor) and b.is_floating_point():
                signal += float((b.double() ** 2).sum())
                noise += float(((a.double() - b.double()) ** 2).sum())
    return 10 * float(torch.log10(torch.tensor(signal / noise))) if noise else float("inf")
