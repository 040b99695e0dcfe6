"""The target `onnx`: one file, checked in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.utils._pytree as pytree

from ..core import CheckFailedError, Report, TensorSpec, atomic
from ..data import class_hits
from ..engines import INT8_DYNAMIC, to_onnx
from ..graph import Program
from ..measure import Parity, compare, pool
from ..runtime import RUNTIMES
from .base import Job

#: Largest difference a float32 file may have, relative to the largest output.
FP32_TOLERANCE = 1e-4
#: Smallest signal-to-noise ratio of an int8 file against the quantised program, and the share of rows whose largest
#: entry may move (one row always may). The engine rounds in integers where the program rounds in floats, so that
#: single steps of the scale differ.
INT8_SQNR_DB = 20.0
INT8_FLIPS = 0.02


class OnnxTarget:
    """Writes one `.onnx` file."""

    name = "onnx"

    def write(self, job: Job, report: Report) -> None:
        """Write, check, keep."""
        with atomic.atomic_path(job.path) as tmp:
            write_model(job.program, tmp, job.precision)
            check_model(job, tmp, report)


def write_model(program: Program, path: Path, precision: str) -> None:
    """Write the ONNX file, checked against the ONNX specification."""
    model = to_onnx(program, precision=precision)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def specs(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX file."""
    graph = onnx.load(str(path), load_external_data=False).graph

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = tuple(d.dim_param or int(d.dim_value) for d in tensor.shape.dim)
        return TensorSpec(name=value.name, dtype=np.dtype(dtype).name, shape=shape)

    return tuple(map(spec, graph.input)), tuple(map(spec, graph.output))


def check_model(job: Job, path: Path, report: Report) -> None:
    """Compare the file's answers with the program's on all batches; raise if they differ too much."""
    session = RUNTIMES.get("onnxruntime")(path)
    names = [s.name for s in specs(path)[0]]
    positions = [job.program.input_names().index(n) for n in names]
    found: list[Parity] = []
    right, right_before, rows = 0, 0, 0
    # With ranges found at run time the file is closer to the float program than to the one with fixed ranges.
    against = job.program.parent if job.precision == INT8_DYNAMIC and job.program.parent else job.program
    for leaves, labels in [*_small_batches(job), *job.batches]:
        expected = _run(against, leaves)
        answers = session.run({n: leaves[i].detach().cpu().contiguous().numpy() for n, i in zip(names, positions)})
        found.append(compare([e.numpy() for e in expected], answers))
        hits = class_hits(torch.from_numpy(answers[0]), labels)
        before = class_hits(expected[0], labels)
        if hits is not None and before is not None:
            right, right_before, rows = right + int(hits.sum()), right_before + int(before.sum()), rows + len(hits)
    report.add(
        "file size", path.stat().st_size, before=job.program.parameters_bytes, unit="bytes", how="weights before"
    )
    parity = pool(found)
    what = "the program" if against is job.program else "the float program"
    how = f"onnxruntime against {what}, {parity.rows} rows"
    report.add("parity, largest difference", parity.max_abs, how=how)
    report.add("parity, relative to the largest output", parity.max_rel, how=how)
    report.add("parity, top-1 agreement", parity.top1, how=how)
    if rows:
        how = f"onnxruntime, {rows} labels"
        report.add("accuracy of the file", right / rows, before=right_before / rows, how=how)
    if job.program.precision == "fp32":
        detail = f"largest relative difference {parity.max_rel:.1e}, allowed {FP32_TOLERANCE:.0e}"
        passed = report.check("parity in onnxruntime", parity.max_rel <= FP32_TOLERANCE, detail)
    else:
        flips = round((1 - parity.top1) * parity.rows)
        allowed = max(1, int(INT8_FLIPS * parity.rows))
        detail = (
            f"SQNR {parity.sqnr_db:.1f} dB (at least {INT8_SQNR_DB:g}), "
            f"{flips} of {parity.rows} rows with another largest entry (at most {allowed})"
        )
        passed = report.check("parity in onnxruntime", parity.sqnr_db >= INT8_SQNR_DB and flips <= allowed, detail)
    if not passed:
        raise CheckFailedError(f"{job.path} was not written: parity in onnxruntime failed: {detail}", report=report)


def _small_batches(job: Job) -> list[tuple[list[Any], Any]]:
    """The example inputs cut to a batch of 1, where the batch is dynamic: exporters like to fix it."""
    leaves = job.batches[0][0]
    shapes = job.program.input_shapes()
    batched = [isinstance(v, torch.Tensor) and bool(s) and isinstance(s[0], str) for v, s in zip(leaves, shapes)]
    if not any(batched):
        return []
    return [([v[:1] if b else v for v, b in zip(leaves, batched)], None)]


def _run(program: Program, leaves: list[Any]) -> list[torch.Tensor]:
    _, tree = pytree.tree_flatten(program.example_inputs)
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    with torch.no_grad():
        outputs = program(*args, **kwargs)
    return [v.detach().cpu() for v in pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor)]
