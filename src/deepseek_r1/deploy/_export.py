"""`export`: one call, one target, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import InputError, Report, probe
from ..data import unpack_batch
from ..engines import Executable
from ..graph import Program, as_inputs, capture
from ..runtime import check_steps
from .base import TARGETS, Job

#: At most this many batches of the dataset check an export.
_BATCHES = 256


_ONNX = "onnxruntime"


def export(
    model: torch.nn.Module | Program | Executable,
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    example_inputs: Any = None,
    dataset: Iterable[Any] | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Sequence[Mapping[str, Any]] = (),
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Report:
    """Write a model for a target and check the files in the target's own runtime.

    Args:
        model: a module, a Program, or an Executable (whose Program is exported).
        path: `*.onnx` for an ONNX file, any other name for an Artifact directory.
        target: name of a target; by default told from `path`.
        example_inputs: what to capture a module with; by default the first batch of `dataset`.
        dataset: batches on which the files must answer like the program.
        labels: class names for an Artifact.
        preprocessing: steps from raw data to model input for an Artifact, see `runtime.preprocess`.

    Raises:
        InputError: nothing to capture with, an empty dataset, or labels or preprocessing that do not fit.
        CheckFailedError: the files answer differently; nothing was written, and what stood there before stays.
        UnsupportedOpError: an operator has no form on the target.

    Example:
        >>> import tempfile
        >>> where = Path(tempfile.mkdtemp()) / "net.onnx"
        >>> export(torch.nn.Linear(4, 2), where, example_inputs=torch.randn(2, 4)).ok
        True
    """
    destination = Path(path)
    chosen = target or ("onnx" if destination.suffix == ".onnx" else "artifact")
    if target is None and destination.suffix not in ("", ".onnx"):
        raise InputError(f"export({str(path)!r}): a name ending in .onnx, or a directory for an Artifact, is needed.")
    writer = TARGETS.get(chosen)()
    check_steps(preprocessing)
    batches = list(islice(dataset, _BATCHES)) if dataset is not None else []
    if dataset is not None and not batches:
        raise InputError("export(dataset=...): the dataset is empty.")
    program = _program(model, example_inputs, batches)
    _check_labels(labels, program)
    flat = [_flat(unpack_batch(b), program) for b in batches]
    args, kwargs = as_inputs(example_inputs) if example_inputs is not None else program.example_inputs
    job = Job(
        program=program,
        # ONNX Runtime's own variant of the program is what its files then hold; other engines have other files.
        precision=model.precision if isinstance(model, Executable) and model.engine == _ONNX else program.precision,
        path=destination,
        name=name or program.name,
        batches=[_flat((args, kwargs, None), program), *flat],
        labels=None if labels is None else tuple(labels),
        preprocessing=tuple(preprocessing),
        extra=dict(extra or {}),
    )
    report = Report(f"export {job.name} to {chosen}")
    report.facts.update(probe().facts())
    report.facts["versions"] = ", ".join(f"{k} {v}" for k, v in versions().items())
    for what, why in program.report.skipped:
        report.skip(f"{program.name}: {what}", why)
    writer.write(job, report)
    return report


def versions() -> dict[str, str]:
    """Versions of the packages that shaped the files."""
    found = {}
    for package in ("deepseek-r1", "torch", "onnx", "onnxscript", "onnxruntime", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _program(model: Any, example_inputs: Any, batches: list[Any]) -> Program:
    if isinstance(model, Executable):
        return model.program
    if isinstance(model, Program):
        return model
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"export needs a module, a Program or an Executable, given {type(model).__name__}.")
    if example_inputs is None:
        if not batches:
            raise InputError("export needs example_inputs= or dataset= to capture the module with.")
        args, kwargs, _ = unpack_batch(batches[0])
        example_inputs = kwargs or args
    return capture(model, example_inputs)


def _check_labels(labels: Sequence[str] | None, program: Program) -> None:
    nodes = {n.name: n for n in program.exported.graph.nodes}
    outputs = (nodes.get(str(n)) for n in program.exported.graph_signature.user_outputs)
    shape = next((n.meta["val"].shape for n in outputs if n is not None), ())
    if labels is not None and shape and str(shape[-1]).isdigit() and int(shape[-1]) != len(labels):
        raise InputError(f"export(labels=...): {len(labels)} labels for {int(shape[-1])} classes; one each is needed.")


def _flat(batch: tuple[Any, Any, Any], program: Program) -> tuple[list[Any], Any]:
    args, kwargs, labels = batch
    if misfit := program.misfit(args, kwargs):
        raise InputError(f"export: {misfit}")
    return pytree.tree_leaves((args, kwargs)), labels
