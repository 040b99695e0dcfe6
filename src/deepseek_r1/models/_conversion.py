"""What a converted model must pass: outputs and loss against its source, on random or given inputs.

Knows nothing about either's format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import CheckFailedError, InputError, Report, UnsupportedOpError
from ..measure import compare

#: Largest difference allowed, as a share of the largest absolute output, or of the loss.
TOLERANCE = 1e-5

#: Sizes tried for open dimensions: (batch, sequence-like, picture-like). Two runs are compared.
_SIZES = ((2, 8, 64), (3, 12, 96), (2, 32, 224), (1, 8, 64))

Array = np.ndarray[Any, Any]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a model was converted from, as far as the check needs it.

    Attributes:
        title: for messages.
        engine: what runs the source ("Keras on torch").
        inputs: (name, shape with None for open sizes, numpy's name of the type), in the module's order.
        outputs: names, in the order of `run`.
        run: input arrays -> output arrays.
        bounds: input -> how many indices it may take.
    """

    title: str
    engine: str
    inputs: Sequence[tuple[str, tuple[int | None, ...], str]]
    outputs: Sequence[str]
    run: Callable[[list[Array]], list[Array]]
    bounds: Mapping[str, int]


def compare_with(
    source: Source,
    run: Callable[[list[Tensor]], list[Tensor]],
    report: Report,
    *,
    example_inputs: Any = None,
    loss: Loss | None = None,
    labels: Any = None,
) -> None:
    """Run source and converted module on the same inputs, given ones or twice random ones; changes the report.

    Raises:
        CheckFailedError: outputs or loss differ.
        InputError: the source refuses the inputs.
        UnsupportedOpError: the module fails where the source runs.
    """
    names = [name for name, _, _ in source.inputs]
    given = [given_arrays(names, example_inputs)] if example_inputs is not None else None
    runs, last = 0, ""
    for feeds in given or [_probe(source, seed, sizes) for seed, sizes in enumerate(_SIZES)]:
        shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in zip(names, feeds, strict=True))
        try:
            theirs = source.run(feeds)
        except Exception as e:  # whatever the source's runtime raises
            last = f"{shapes}: {first_line(e)}"
            continue
        ours = _run(run, feeds, f"{source.title} ({shapes})")
        outputs = source.outputs if len(source.outputs) == len(ours) else [f"output_{i}" for i in range(len(ours))]
        compared = list(zip(outputs, ours, theirs, strict=True))
        judge(report, source.title, compared, engine=source.engine, shapes=shapes, loss=loss, labels=labels)
        if any(_same_everywhere(y) for y in theirs):
            report.note(f"an output is all but the same for every input ({shapes}): example_inputs=... checks more")
        runs += 1
        if runs == 2:
            return
    if not runs:
        advice = "" if given else " Give real ones: example_inputs=(tensor, ...)."
        raise InputError(f"{source.engine} refuses the inputs {last}{advice}")


def _run(run: Callable[[list[Tensor]], list[Tensor]], feeds: list[Array], what: str) -> list[Tensor]:
    try:
        with torch.no_grad():
            return run([torch.from_numpy(v) for v in feeds])
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        raise UnsupportedOpError(
            f"{what}: the converted module fails where the source runs: {type(e).__name__}: {first_line(e)}"
        ) from e


def given_arrays(names: Sequence[str], example_inputs: Any) -> list[Array]:
    """A tensor, a tuple, or a mapping of name -> tensor as arrays in the order of the names.

    Raises:
        InputError: other names, or another number.
    """
    if isinstance(example_inputs, Mapping):
        missing = [n for n in names if n not in example_inputs]
        if missing:
            raise InputError(f"example_inputs lacks {missing}; the model's inputs are {list(names)}.")
        values = [example_inputs[n] for n in names]
    else:
        values = list(example_inputs) if isinstance(example_inputs, tuple | list) else [example_inputs]
    if len(values) != len(names):
        raise InputError(f"example_inputs has {len(values)} tensors; the model's inputs are {list(names)}.")
    return [torch.as_tensor(v).detach().cpu().numpy() for v in values]


def _probe(source: Source, seed: int, sizes: tuple[int, int, int]) -> list[Array]:
    """Random inputs in the source's shapes."""
    rng = np.random.default_rng(seed)
    found = []
    for name, dims, dtype in source.inputs:
        if dtype == "string":
            raise InputError(f"the input {name!r} is text; give the part of the model behind it.")
        shape = [
            size if size is not None else sizes[0] if axis == 0 else sizes[2 if len(dims) == 4 else 1]
            for axis, size in enumerate(dims)
        ]
        bound = source.bounds.get(name)
        if dtype.startswith("float") and bound is None:
            found.append(rng.standard_normal(shape).astype(dtype))
            continue
        value = np.asarray(rng.integers(0, bound or 2, shape))
        if value.ndim > 1 and value.size:
            # A mask of nothing but zeros has no defined mean or attention.
            value[..., 0] = min(1, (bound or 2) - 1)
        found.append(value.astype(dtype))
    return found


def _same_everywhere(output: Array) -> bool:
    """Whether the rows of a batch hardly differ, so that much of the model could be wrong unseen."""
    if output.ndim < 2 or len(output) < 2 or not np.issubdtype(output.dtype, np.floating) or not output.size:
        return False
    return bool(np.ptp(output, axis=0).max() <= TOLERANCE * np.abs(output).max())


def first_line(error: Exception) -> str:
    """The first line of another library's message, as a sentence."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".: ") + "."


def judge(
    report: Report,
    what: str,
    outputs: Sequence[tuple[str, Tensor, Array]],
    *,
    engine: str,
    shapes: str,
    limit: float = TOLERANCE,
    loss: Loss | None = None,
    labels: Any = None,
) -> None:
    """Add rows and checks for one run: each output (name, ours, the source's), and the loss of all.

    Args:
        engine: what ran the source ("onnxruntime").
        shapes: the inputs' names and shapes, for the rows and messages.
        loss: `loss(outputs, labels)`; by default the mean squared error, or the cross-entropy where labels are
            integers. One output is given as a tensor, several as a tuple.
        labels: by default random numbers in the outputs' shapes.

    Raises:
        CheckFailedError: an output or the loss differs by more than the limit.
    """
    how = f"{engine}, {shapes}"
    for name, ours, theirs in outputs:
        worst = _difference(ours, theirs)
        report.add(f"difference of {name}", worst, unit="of the largest value", how=how)
        _demand(report, what, f"the output {name!r}", f"parity of {name}", worst, limit, engine, shapes)
    floats = [(ours, theirs) for _, ours, theirs in outputs if np.issubdtype(theirs.dtype, np.floating)]
    if loss is None and (not floats or any(theirs.size == 0 for _, theirs in floats)):
        report.skip("loss", "the outputs are not floating-point numbers")
        return
    before, after = _losses(outputs, floats, loss, labels)
    worst = abs(after - before) / max(abs(before), 1e-30) if np.isfinite(before) or np.isfinite(after) else 0.0
    report.add("loss", after, before=before, how=how)
    _demand(report, what, "the loss", "parity of the loss", worst, limit, engine, shapes)


def _losses(outputs: Any, floats: Any, loss: Loss | None, labels: Any) -> tuple[float, float]:
    """The loss of the source and ours, in double precision."""
    if loss is None and labels is None:
        rng = np.random.default_rng(0)
        targets = [rng.standard_normal(theirs.shape) for _, theirs in floats]
        sides = zip(*floats, strict=True)
        before, after = (
            sum(float(np.mean((_double(y) - t) ** 2)) for y, t in zip(side, targets, strict=True))
            for side in reversed(list(sides))
        )
        return before, after
    function = loss or _usual_loss
    found = []
    for side in (2, 1):
        values = [torch.from_numpy(_double(o[side])) for o in outputs]
        try:
            found.append(float(function(values[0] if len(values) == 1 else tuple(values), labels)))
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            shapes = [list(v.shape) for v in values]
            raise InputError(f"the loss fails on outputs of shape {shapes}: {type(e).__name__}: {e}") from e
    return found[0], found[1]


def _double(value: Any) -> Array:
    plain = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    return plain.astype(np.float64) if np.issubdtype(plain.dtype, np.floating) else plain


def _usual_loss(outputs: Any, labels: Any) -> Tensor:
    y, target = outputs if isinstance(outputs, Tensor) else outputs[0], torch.as_tensor(labels)
    return F.mse_loss(y, target.to(y.dtype)) if target.is_floating_point() else F.cross_entropy(y, target.long())


def _demand(
    report: Report, what: str, part: str, name: str, worst: float, limit: float, engine: str, shapes: str
) -> None:
    if not report.check(name, worst <= limit, f"{worst:.2e} of at most {limit:.0e}"):
        raise CheckFailedError(
            f"{what}: {part} of the converted module differs from {engine}'s by {worst:.2e} of its largest value, "
            f"allowed is {limit:.0e} (inputs: {shapes}). Give realistic values with example_inputs=..., or report the "
            "model as a defect.",
            report=report,
        )


def _difference(ours: Tensor, theirs: Array) -> float:
    mine = ours.detach().cpu().numpy()
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return float("inf")
    if np.issubdtype(theirs.dtype, np.floating):
        return compare([theirs], [mine]).max_rel
    # Integers are indices or codes as often as quantities: what counts is how many are the same.
    return float(np.mean(mine != theirs)) if mine.size else 0.0
