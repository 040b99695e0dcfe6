"""`deepseek-r1 train`: a model on data, with checkpoints, weights, a log and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import ConfigError, InputError, Report
from ._frame import Html, Json, Seed, verb, with_sections
from ._options import BatchSize, ImageSize, NeededData, Weights

_Accumulation = typer.Option(
    "--gradient-accumulation-steps", "--gradient-accumulation", "--gradient_accumulation",
    help="Batches for one optimizer step.",
)  # fmt: skip
_Fp16 = typer.Option("--fp16-enable", "--fp16_enable", metavar="True|False", help="True: the same as --precision fp16.")
_MODEL = "file.py:factory, an .onnx, .keras or .h5 file, a SavedModel, or a name such as gpt2 or org/name."


@verb(show=with_sections)
def train(
    data: NeededData,
    model: Annotated[str | None, typer.Argument(help=_MODEL)] = None,
    named: Annotated[str | None, typer.Option("--model", help="The same as the argument.", metavar="MODEL")] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, weights and report.")] = Path("runs/train"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part, all resumed ones counted.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw8bit, paged_adamw8bit, lion, muon, adaptive or sgd.")
    ] = "adamw",
    schedule: Annotated[str, typer.Option(help="constant, linear, cosine, wsd or staged.")] = "constant",
    warmup: Annotated[str, typer.Option(help="Steps (100) or a part of the run (0.1) in which the rate climbs.")] = "0",
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the optimizer; not on biases and norms.")] = 0.01,
    clip_grad_norm: Annotated[float | None, typer.Option(help="Largest norm of all gradients together.")] = None,
    batch_size: BatchSize = 32,
    micro_batch_size: Annotated[int | None, typer.Option(help="Samples in one forward and backward pass.")] = None,
    gradient_accumulation_steps: Annotated[int, _Accumulation] = 1,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    fp16_enable: Annotated[str | None, _Fp16] = None,
    memory_gb: Annotated[str | None, typer.Option(help="Memory that training may use, in GB, or auto.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    device: Annotated[
        str, typer.Option("--device", "--devices", help="auto, cpu, cuda, cuda:N, or N for GPU number N.")
    ] = "auto",
    pipeline: Annotated[int, typer.Option(help="Stages of a pipeline; 1 on one device.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch while training.")] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Use deterministic kernels only.")] = False,
    weights: Weights = None,
    save_dir: Annotated[Path | None, typer.Option(help="Folder for checkpoints; OUT/checkpoints by default.")] = None,
    save_every_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    save_every_epochs: Annotated[int, typer.Option(help="Epochs between checkpoints.")] = 1,
    keep_last: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 3,
    keep_best: Annotated[int, typer.Option(help="Checkpoints to keep beside those: the best by val_loss.")] = 0,
    async_save: Annotated[
        bool | None, typer.Option("--async-save/--no-async-save", help="Write checkpoints in the background.")
    ] = None,
    save_frozen: Annotated[
        bool | None,
        typer.Option("--save-frozen/--no-save-frozen", help="Keep what is frozen in checkpoints; not under adapters."),
    ] = None,
    on_save_error: Annotated[str, typer.Option(help="stop, or continue without the checkpoint.")] = "stop",
    early_stop_patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without gain.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Folder for log.jsonl and TensorBoard event files.")] = None,
    log_every: Annotated[int, typer.Option(help="Steps between points of the log.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    export: Annotated[bool, typer.Option("--export", help="Also write model.onnx, checked.")] = False,
    image_size: ImageSize = None,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Train a model and measure it on the test part.

    Writes weights, checkpoints and a report to --out. SIGTERM and Ctrl-C finish the step, save, and say how to go on.
    """
    chosen = {
        "precision": _precision(precision, fp16_enable), "device": _device(device, pipeline), "seed": seed,
        "warmup": _number("--warmup", warmup), "memory_gb": _memory(memory_gb), "compile": compile or "auto",
        "micro_batch_size": micro_batch_size, "gradient_accumulation_steps": gradient_accumulation_steps,
        "schedule": schedule, "weight_decay": weight_decay, "clip_grad_norm": clip_grad_norm, "threads": threads,
        "deterministic": deterministic, "save_dir": save_dir or out / "checkpoints", "keep_last": keep_last,
        "save_every_steps": save_every_steps, "save_every_epochs": save_every_epochs, "keep_best": keep_best,
        "async_save": "auto" if async_save is None else async_save, "on_save_error": on_save_error,
        "save_frozen": "auto" if save_frozen is None else save_frozen,
        "early_stop_patience": early_stop_patience, "log_dir": log_dir, "log_every": log_every,
    }  # fmt: skip
    what = _one_model(model, named)
    from ._train import train_model

    return train_model(
        what, data, out=out, epochs=epochs, lr=lr, optimizer=optimizer, batch_size=batch_size, settings=chosen,
        weights=weights, resume=resume, export=export, image_size=image_size,
    )  # fmt: skip


def _one_model(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise InputError(f"two models were given, {argument} and --model {option}; one of them is enough.")
    if found := argument or option:
        return found
    raise InputError("no model was given; name one, such as model.py:build, as the argument or with --model.")


def _precision(precision: str, fp16: str | None) -> str:
    if fp16 is None:
        return precision
    if fp16.lower() not in ("true", "false"):
        raise ConfigError(f"--fp16-enable {fp16}: True or False is needed.")
    if fp16.lower() == "false":
        return precision
    if precision not in ("auto", "fp16"):
        raise ConfigError(f"--fp16-enable True and --precision {precision} contradict each other; give one of them.")
    return "fp16"


def _device(device: str, pipeline: int) -> str:
    names = [name.strip() for name in device.split(",")]
    if len(names) > 1:
        raise ConfigError(f"--devices {device}: this release trains on one device; name one of them, or cpu or auto.")
    if pipeline != 1:
        raise ConfigError(f"--pipeline {pipeline}: this release trains on one device, where 1 is what there is.")
    return f"cuda:{names[0]}" if names[0].isdecimal() else names[0]


def _memory(text: str | None) -> float | str | None:
    return text if text in (None, "auto") else float(_number("--memory-gb", text))


def _number(option: str, text: str | None) -> int | float:
    try:
        return int(text or "")
    except ValueError:
        pass
    try:
        return float(text or "")
    except ValueError:
        raise ConfigError(f"{option} {text}: a number is needed.") from None
