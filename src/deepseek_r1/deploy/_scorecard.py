"""Before and after: the eager float model against the Artifact in a fresh process without torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import InputError, Report, open_artifact, probe
from ..data import unpack_batch
from ..engines import on_one_thread
from ..graph import Program
from ..measure import ENOUGH_ROUNDS, QUIET_SPREAD, compare, paired_latency, peak_memory_of, ratio_interval
from ..runtime import load

_FRESH = """
import sys
import numpy as np
from deepseek_r1.runtime import load
predictor = load(sys.argv[1])
x = np.load(sys.argv[2])
outputs = [predictor(x[i : i + 256]) for i in range(0, len(x), 256)]
outputs = [o[0] if isinstance(o, tuple) else o for o in outputs]
np.save(sys.argv[3], np.concatenate(outputs))
RESULT = {"torch": "torch" in sys.modules}
"""
_EAGER = """
import sys
import numpy as np
import torch
from deepseek_r1.graph import Program
program = Program.load(sys.argv[1])
x = torch.from_numpy(np.load(sys.argv[2]))
with torch.no_grad():
    for i in range(0, len(x), 256):
        program(x[i : i + 256])
"""


def scorecard(
    program: Program,
    artifact: str | os.PathLike[str],
    dataset: Iterable[Any] | None,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    labels: Sequence[str] | None = None,
) -> Report:
    """Compare a float program run by eager PyTorch with an Artifact, on labelled data.

    The Artifact answers in a fresh process without torch; peak memory of both sides is that of a fresh process.

    Args:
        program: the float program ("before"); of a quantised one, its float parent is taken.
        artifact: directory of the Artifact ("after").
        dataset: batches `(inputs, class indices)` of one input tensor.
        batch_sizes: for the latency rows.
        labels: class names for the confusion matrix.

    Returns:
        Rows: accuracy, size, latency per batch size, peak memory, parity; plots: latency, trade-off, confusion.

    Raises:
        InputError: the dataset is empty, or not of the form above.
    """
    program = program.parent or program
    x, y = _gather(dataset or ())
    opened = open_artifact(artifact)
    report = Report(f"{opened.manifest.name}: eager PyTorch to {opened.manifest.engine} {opened.manifest.precision}")
    report.facts.update(probe().facts())
    with torch.no_grad():
        before = torch.cat([program(part) for part in torch.from_numpy(x).split(256)]).numpy()
    after, memory_before, memory_after, had_torch = _fresh_processes(program, artifact, x)
    accuracy = float((before.argmax(-1) == y).mean()), float((after.argmax(-1) == y).mean())
    size = program.parameters_bytes, opened.model_path.stat().st_size
    report.add("accuracy", accuracy[1], before=accuracy[0], how=f"{len(y)} held-out samples, fresh process")
    report.add("size", size[1] / 1e3, before=size[0] / 1e3, unit="kB", how="float weights; model file")
    _latency(program, artifact, x, batch_sizes, report)
    torch_alone, _ = peak_memory_of("import torch")
    report.facts["memory of importing PyTorch alone"] = f"{torch_alone / 1e6:.1f} MB"
    how = "fresh processes that load and predict; before with PyTorch"
    report.add("peak memory", memory_after / 1e6, before=memory_before / 1e6, unit="MB", how=how)
    parity = compare([before], [after])
    report.add("parity, top-1 agreement", parity.top1, how=f"{len(y)} samples, against eager float32")
    report.add("parity, largest difference", parity.max_abs, how="of the outputs, against eager float32")
    report.check("runs without torch", not had_torch, "fresh process, runtime only")
    _figures(report, accuracy, size, after, y, labels, opened.manifest.precision)
    return report


def _gather(dataset: Iterable[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    xs, ys = [], []
    for batch in dataset:
        args, kwargs, labels = unpack_batch(batch)
        if len(args) != 1 or kwargs or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            raise InputError("scorecard needs batches (one input tensor, class indices).")
        xs.append(args[0].cpu())
        ys.append(labels.cpu())
    if not xs:
        raise InputError("scorecard: the dataset is empty.")
    return torch.cat(xs).numpy(), torch.cat(ys).numpy()


def _fresh_processes(program: Program, artifact: Any, x: Any) -> tuple[Any, int, int, bool]:
    with tempfile.TemporaryDirectory(prefix="deepseek-r1-") as folder:
        inputs, outputs, source = (str(Path(folder) / n) for n in ("x.npy", "y.npy", "before.dr1"))
        np.save(inputs, x)
        program.save(source)
        after_bytes, result = peak_memory_of(_FRESH, [os.fspath(artifact), inputs, outputs])
        before_bytes, _ = peak_memory_of(_EAGER, [source, inputs])
        return np.load(outputs), before_bytes, after_bytes, bool(result["torch"])


def _latency(program: Program, artifact: Any, x: Any, batch_sizes: Sequence[int], report: Report) -> None:
    predictor = load(artifact)
    for size in batch_sizes:
        part = np.resize(x, (size, *x.shape[1:]))
        tensor = torch.from_numpy(part)

        def eager(tensor: torch.Tensor = tensor) -> Any:
            with torch.no_grad():
                return program.module()(tensor)

        def shipped(part: Any = part) -> Any:
            return predictor(part)

        # Eager at its best, not as its default thread count happens to leave it; each twice, for the noise.
        default, one = f"{torch.get_num_threads()} threads", "1 thread"
        variants = {default: eager, one: on_one_thread(eager)}
        again = {f"{name} again": function for name, function in variants.items()}
        times = paired_latency({**variants, **again, "after": shipped}, rounds=60, max_seconds=8)
        threads = min(variants, key=lambda name: times[name].median_ms)
        before, after = times[threads], times["after"]
        noise = ratio_interval(times[f"{threads} again"], before)
        low, middle, high = ratio_interval(before, after)
        how = f"{len(after.seconds)} rounds, {middle:.1f}x ({low:.1f} to {high:.1f}), eager on {threads}"
        report.add(f"latency, batch {size}", after.median_ms, before=before.median_ms, unit="ms", how=how)
        report.facts[f"noise at batch {size}"] = (
            f"eager against itself {noise[1]:.2f}x ({noise[0]:.2f} to {noise[2]:.2f})"
        )
        if max(noise[2], 1 / noise[0]) > QUIET_SPREAD:
            report.note(f"the machine was busy at batch {size}; run again when it is quiet for latencies to quote")
        elif len(after.seconds) < ENOUGH_ROUNDS:
            report.note(f"there was time for {len(after.seconds)} rounds only at batch {size}")
        series = {"before": [s * 1e3 for s in before.seconds], "after": [s * 1e3 for s in after.seconds]}
        report.plot(
            "histogram", f"Latency at batch {size}", series, x_label="ms per call", y_label="rounds",
            caption=f"Eager PyTorch (before) and the Artifact (after), {middle:.1f}x faster in the median.",
        )  # fmt: skip


def _figures(
    report: Report, accuracy: tuple[float, float], size: tuple[int, int], after: Any, y: Any,
    labels: Sequence[str] | None, precision: str,
) -> None:  # fmt: skip
    first = next(r for r in report.rows if r.metric.startswith("latency"))
    points = {
        "eager fp32": [[first.before, accuracy[0] * 100, 40 + size[0] / max(size) * 400]],
        f"artifact {precision}": [[first.after, accuracy[1] * 100, 40 + size[1] / max(size) * 400]],
    }
    names = [f"{size[0] / 1e3:.0f} kB", f"{size[1] / 1e3:.0f} kB"]
    report.plot(
        "scatter", "Size, accuracy, latency", points, x_label=f"ms, {first.metric.removeprefix('latency, ')}",
        y_label="accuracy, %", labels=names, caption="Up and left is better; the area of a point is its size in bytes.",
    )  # fmt: skip
    classes = after.shape[-1]
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (y, after.argmax(-1)), 1)
    ticks = list(labels) if labels is not None else [str(i) for i in range(classes)]
    report.plot(
        "matrix", "Confusion", {"counts": matrix.tolist()}, x_label="predicted", y_label="true", labels=ticks,
        caption="Held-out samples by true and predicted class, answered by the Artifact.",
    )  # fmt: skip
