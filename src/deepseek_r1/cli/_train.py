"""The work of `deepseek-r1 train`, on the public API. Imports torch: only the verb may import this, when it runs."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..core import DeepSeekError, InputError, Report, atomic
from ..core.userfile import place, told
from ..graph import Program
from ..train import Terminated, Trainer, TrainingConfig
from ._inputs import Opened, open_inputs


def train_model(
    model: str,
    data: str,
    *,
    out: Path,
    epochs: int,
    lr: float,
    optimizer: str,
    batch_size: int,
    settings: Mapping[str, Any],
    weights: Path | None,
    resume: bool,
    export: bool,
    image_size: str | None,
) -> Report:
    """Train, measure on the test part, and write `model.safetensors` and the report to `out`.

    Args:
        settings: fields of the TrainingConfig, `save_dir` and `seed` among them.

    Raises:
        DeepSeekError: whatever was given cannot be used, or the loss is not finite.
        Terminated: SIGTERM; the step was finished and saved, and the command to go on was written.
    """
    config = TrainingConfig(**settings)
    kept = Path(settings["save_dir"])
    if not resume and kept.is_dir() and any(kept.iterdir()):
        raise InputError(f"{kept} has checkpoints of an earlier run: add --resume to go on, or give another --out.")
    opened = open_inputs(
        model, weights=weights, data=data, batch_size=batch_size, image_size=image_size, seed=settings["seed"]
    )
    if isinstance(opened.model, Program):
        raise InputError(
            f"{model} is a captured graph, which cannot be trained; give file.py:factory, an .onnx file or a name."
        )
    loader = opened.part("train")
    assert loader is not None, "--data is a needed option"
    trainer = Trainer(opened.model, loader, opened.part("val"), lr=lr, config=config, optimizer=optimizer)
    trainer.resume_with = _same_command()
    if resume:
        trainer.resume()
    report = _train(trainer, epochs, kept, opened)
    _measure(trainer, opened, report)
    with _keeping(report):
        _write(trainer, opened, out, report, export)
    return report


def _write(trainer: Trainer, opened: Opened, out: Path, report: Report, export: bool) -> None:
    weights_file = out / "model.safetensors"
    # Clones: two names may share one tensor, which the format refuses.
    state = {name: t.detach().cpu().clone().contiguous() for name, t in trainer.model.state_dict().items()}
    atomic.write_bytes(weights_file, save(state))
    report.note(f"wrote {weights_file}; give it to the next command with --weights {weights_file}")
    if export:
        wanted = {k: v for k, v in opened.for_artifact().items() if k == "dataset"}
        report.sections.append(trainer.export(out / "model.onnx", **wanted))
        report.note(f"wrote {out / 'model.onnx'}")
    report.save(out / "report.json")
    report.save(out / "report.html")


@contextlib.contextmanager
def _keeping(report: Report) -> Iterator[None]:
    """An error after the training takes the training's report with it."""
    try:
        yield
    except (DeepSeekError, OSError) as e:
        if isinstance(found := getattr(e, "report", None), Report):
            report.sections.append(found)
        e.report = report  # type: ignore[union-attr]
        raise


def _same_command() -> str:
    """What was typed, with --resume."""
    program = ["python", "-m", "deepseek_r1"] if Path(sys.argv[0]).name == "__main__.py" else ["deepseek-r1"]
    words = [*program, *sys.argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def _train(trainer: Trainer, epochs: int, kept: Path, opened: Opened) -> Report:
    first = trainer.step
    try:
        return trainer.train(epochs)
    except (DeepSeekError, Terminated):
        raise
    except (Exception, SystemExit) as e:
        # The first step is where a model and data that do not fit meet.
        misfit = trainer.step == first and isinstance(e, RuntimeError | TypeError | ValueError | IndexError)
        if not misfit and not place(e):
            raise
        what = f"the model failed after step {trainer.step}"
        if misfit:
            what = f"the model cannot be trained on this data{_shape(opened)}"
        again = ""
        if kept.is_dir() and any(kept.glob("step-*")):
            again = f". Checkpoints are in {kept}: once this is mended, the same command with --resume goes on."
        raise InputError(f"{what}: {told(e)}{again}") from e


def _shape(opened: Opened) -> str:
    shape = opened.data.input_shape if opened.data is not None else None
    return "" if shape is None else f", whose samples have the shape {tuple(shape)}"


def _measure(trainer: Trainer, opened: Opened, report: Report) -> None:
    test = opened.part("test")
    if test is None:
        report.skip("test metrics", "the data has no test part")
    else:
        for name, value in trainer.evaluate(test).items():
            report.add(f"test {name}", value, how="the whole test part, after the last epoch")
    for note in opened.data.notes if opened.data is not None else ():
        report.note(f"data: {note}")
    report.facts["parameters"] = sum(p.numel() for p in trainer.model.parameters())
