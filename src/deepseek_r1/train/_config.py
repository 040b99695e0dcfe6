"""`TrainingConfig`, and the function that settles everything left on "auto". Knows nothing about loops or data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..core import ConfigError, probe
from ._blocks import block_runs, share_in_blocks
from ._frozen import has_adapters
from .memory._settings import check_settings, settle_memory

SCHEMA_VERSION = 1
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
#: The share of a model in repeated blocks from which on they alone are compiled.
_WORTH = 0.5
#: Bytes of parameters from which on a CPU writes checkpoints in the background: below, writing takes milliseconds.
_WORTH_A_THREAD = 64 * 10**6
SCHEDULES = ("constant", "linear", "cosine", "wsd", "staged")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a `Trainer` trains. Frozen: derive another with `dataclasses.replace`.

    Attributes:
        micro_batch_size: samples in one forward and backward pass. A larger loader batch is split, and the
            gradients are added up so that they equal those of the whole batch. None: the loader's batch.
        gradient_accumulation_steps: loader batches for one optimizer step.
        zero_stage: 0; sharded optimizer states need several devices.
        precision: "fp32", "bf16" or "fp16" (mixed precision by autocast), "auto": where the hardware gains.
        memory_gb: the most that may be alive on the device in a step, in 10**9 bytes, or "auto" (what is free, less a
            margin). A plan of what is kept, recomputed or offloaded is made at the first batch. None: no limit. The
            environment variable R1_MEMORY_OPTIMIZER=1 makes None mean "auto" (where the model can be planned).
        checkpoint_interval: recompute the model's blocks in runs of so many, without a plan. None: nothing.
        compress_activations: whether the plan for memory_gb may also store what blocks save in 8 bits, which is often
            faster than recomputing, and rounds the gradients.
        compile: "blocks" runs each of the model's repeated blocks through `torch.compile`, True the whole model,
            False nothing; "auto": the blocks on a GPU, where they hold most of the model.
        cuda_graph: whether whole steps are recorded as CUDA graphs, one for each shape of batches, and replayed;
            "auto": on a GPU, with an optimizer that can be recorded. Steps that cannot be are run as ever.
        device: "auto" (the model's GPU, else the first GPU, else the CPU), "cpu", "cuda" or "cuda:N".
        seed: given to `seed_everything` when a run starts. None leaves the random generators as they are.
        deterministic: use only deterministic kernels while training.
        threads: CPU threads of PyTorch while training, or None for its own choice. One thread is often faster for
            a small network, and loses nothing when another program takes a core.
        schedule: "constant", "linear" (to zero), "cosine" (to zero), "wsd" (stays, and falls to zero at the end) or
            "staged" (a little lower in each of several parts), over all steps of the run; see `lr_factor`.
        warmup: steps (an int) or a fraction of the run (a float below 1) in which the rate climbs from zero.
        cooldown: steps or a fraction of the run at its end in which "wsd" falls to zero.
        stages: equal parts of the run for "staged".
        stage_factor: what "staged" multiplies the rate with from one part to the next.
        weight_decay: of the default optimizer; biases and norms are left out of it.
        clip_grad_norm: largest allowed norm of all gradients together, or None.
        ema_decay: between 0 and 1, as 0.999: a moving average of the parameters is kept, with which the Trainer
            evaluates, predicts and exports; see `ExponentialMovingAverage`. None: there is none.
        early_stop_patience: stop after so many epochs without a better value; None: never.
        early_stop_metric: a key of `Trainer.history` entries, also used to name the best epoch.
        early_stop_mode: "min" or "max".
        save_dir: directory for checkpoints; None: none are written.
        save_every_steps: optimizer steps between checkpoints, or None.
        save_every_epochs: epochs between checkpoints, or None.
        keep_last: checkpoints to keep in save_dir, or None for all.
        keep_best: checkpoints to keep beside those: the ones with the best `early_stop_metric` (of the checkpoints
            written at an epoch's end, which have one).
        async_save: True writes checkpoints in the background: a step waits only for a copy in host memory. "auto":
            on a GPU, and on a CPU for models of 64 MB and more.
        on_save_error: "stop" ends the run with the CheckpointError, "continue" warns and trains on.
        save_frozen: whether checkpoints hold what training leaves as it is: parameters without gradients, and packed
            weights. False leaves it out; `resume` then checks that the model given has the same. "auto": False for
            a model with adapters.
        shard_gb: checkpoints of more than so many gigabytes (10^9 bytes) are split into files of at most that size.
        log_dir: directory for `log.jsonl` and TensorBoard event files; None: none are written.
        log_every: optimizer steps between points of the loss curve (`Trainer.losses`) and of the log.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> TrainingConfig(micro_batch_size=8, schedule="cosine", warmup=0.1).schedule
        'cosine'
    """

    micro_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    zero_stage: int = 0
    precision: str = "auto"
    memory_gb: float | str | None = None
    checkpoint_interval: int | None = None
    compress_activations: bool = False
    compile: bool | Literal["auto", "blocks"] = "auto"
    cuda_graph: bool | Literal["auto"] = "auto"
    device: str = "auto"
    seed: int | None = None
    deterministic: bool = False
    threads: int | None = None
    schedule: str = "constant"
    warmup: int | float = 0
    cooldown: int | float = 0.2
    stages: int = 3
    stage_factor: float = 0.8
    weight_decay: float = 0.01
    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    early_stop_patience: int | None = None
    early_stop_metric: str = "val_loss"
    early_stop_mode: str = "min"
    save_dir: str | None = None
    save_every_steps: int | None = None
    save_every_epochs: int | None = 1
    keep_last: int | None = 3
    keep_best: int = 0
    async_save: bool | Literal["auto"] = "auto"
    on_save_error: str = "stop"
    save_frozen: bool | Literal["auto"] = "auto"
    shard_gb: float = 4.0
    log_dir: str | None = None
    log_every: int = 10
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation_steps", "log_every", "stages"):
            self._count(name)
        for name in (
            "micro_batch_size", "threads", "early_stop_patience", "save_every_steps", "save_every_epochs", "keep_last",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                self._count(name)
        self._one_of("precision", PRECISIONS)
        self._one_of("schedule", SCHEDULES)
        self._one_of("early_stop_mode", ("min", "max"))
        self._later()
        check_settings(self.memory_gb, self.checkpoint_interval, self.compress_activations)
        if self.compile not in (True, False, "auto", "blocks"):
            self._refuse("compile", "True, False, 'blocks' or 'auto'")
        if self.cuda_graph not in (True, False, "auto"):
            self._refuse("cuda_graph", "True, False or 'auto'")
        self._check_saving()
        if not isinstance(self.deterministic, bool):
            self._refuse("deterministic", "True or False")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < 2**32):
            self._refuse("seed", "None or an integer from 0 to 2**32 - 1")
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            self._refuse("weight_decay", "a number >= 0")
        if self.clip_grad_norm is not None and not (_is_number(self.clip_grad_norm) and self.clip_grad_norm > 0):
            self._refuse("clip_grad_norm", "None or a number > 0")
        if self.ema_decay is not None and not (_is_number(self.ema_decay) and 0 < self.ema_decay < 1):
            self._refuse("ema_decay", "None or a number between 0 and 1")
        for name in ("warmup", "cooldown"):
            self._check_length(name)
        if not _is_number(self.stage_factor) or not 0 < self.stage_factor <= 1:
            self._refuse("stage_factor", "a number above 0 and at most 1")
        self._check_names()
        if self.schema_version != SCHEMA_VERSION:
            self._refuse("schema_version", f"{SCHEMA_VERSION}; update deepseek-r1 to read a later one")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ConfigError(f"TrainingConfig({name}={getattr(self, name)!r}): the value must be {allowed}.")

    def _count(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < 1:
            self._refuse(name, "an integer >= 1")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, "one of " + ", ".join(repr(a) for a in allowed))

    def _check_length(self, name: str) -> None:
        value = getattr(self, name)
        if not ((_is_int(value) and value >= 0) or (isinstance(value, float) and 0 <= value < 1)):
            self._refuse(name, "a number of steps (an integer >= 0) or a fraction of the run (a float in [0, 1))")

    def _check_saving(self) -> None:
        if self.async_save not in (True, False, "auto"):
            self._refuse("async_save", "True, False or 'auto'")
        if self.save_frozen not in (True, False, "auto"):
            self._refuse("save_frozen", "True, False or 'auto'")
        self._one_of("on_save_error", ("stop", "continue"))
        if not _is_int(self.keep_best) or self.keep_best < 0:
            self._refuse("keep_best", "an integer >= 0")
        if not _is_number(self.shard_gb) or self.shard_gb <= 0:
            self._refuse("shard_gb", "a number > 0")

    def _check_names(self) -> None:
        if not isinstance(self.early_stop_metric, str):
            self._refuse("early_stop_metric", "a key of the history, such as 'val_loss'")
        for name in ("save_dir", "log_dir"):
            value = getattr(self, name)
            if value is not None:
                if not (isinstance(value, str) or hasattr(value, "__fspath__")):
                    self._refuse(name, "None or the path of a directory")
                object.__setattr__(self, name, str(value))
        if not isinstance(self.device, str | torch.device):
            self._refuse("device", "'auto', 'cpu', 'cuda' or 'cuda:N'")
        object.__setattr__(self, "device", str(self.device))

    def _later(self) -> None:
        if self.zero_stage != 0:
            if self.zero_stage not in (1, 2, 3):
                self._refuse("zero_stage", "0")
            raise ConfigError(
                f"TrainingConfig(zero_stage={self.zero_stage!r}): sharding over devices is not in this release, which "
                "trains on one device; use zero_stage=0."
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def resolve(config: TrainingConfig, model: nn.Module) -> tuple[TrainingConfig, dict[str, str]]:
    """Settle every "auto" for this model on this machine: the new config, and the reason for each choice.

    Raises:
        ConfigError: the device is absent or of a kind this release does not train on.

    Example:
        >>> settled, reasons = resolve(TrainingConfig(device="cpu"), nn.Linear(2, 2))
        >>> settled.device, settled.compile, sorted(reasons)
        ('cpu', False, ['compile', 'precision'])
    """
    reasons: dict[str, str] = {}
    device = config.device
    if device == "auto":
        device, reasons["device"] = _choose_device(model)
    _check_device(device)
    precision = config.precision
    if precision == "auto":
        precision, reasons["precision"] = _choose_precision(torch.device(device))
    _check_precision(device, precision)
    settled, more = settle_memory(replace(config, device=device, precision=precision))
    reasons.update(more)
    if settled.compile == "auto":
        chosen, reasons["compile"] = _choose_compile(torch.device(device), model)
        settled = replace(settled, compile=chosen)
    if settled.cuda_graph == "auto":
        graphs = torch.device(device).type == "cuda" and precision != "fp16"
        settled = replace(settled, cuda_graph=graphs)
        if precision == "fp16" and not graphs:
            reasons["cuda_graph"] = "False: the gradient scaler of fp16 decides on the host"
    if settled.async_save == "auto":
        in_background = torch.device(device).type == "cuda" or _bytes(model) >= _WORTH_A_THREAD
        settled = replace(settled, async_save=in_background)
        if in_background and config.save_dir is not None:
            reasons["async_save"] = "True: a step waits for a copy in host memory only, the disk is written behind it"
    if settled.save_frozen == "auto":
        settled = replace(settled, save_frozen=not has_adapters(model))
        if not settled.save_frozen and config.save_dir is not None:
            reasons["save_frozen"] = "False: checkpoints hold no frozen weights, and resume() wants the same base model"
    return settled, reasons


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.parameters() if not nn.parameter.is_lazy(t))


def _choose_compile(device: torch.device, model: nn.Module) -> tuple[bool | Literal["blocks"], str]:
    if device.type != "cuda":
        return False, "False: compiling costs minutes before the first step; set compile=True for long runs"
    runs = block_runs(model)
    share = share_in_blocks(model, runs)
    if share < _WORTH:
        return False, f"False: {share:.0%} of the parameters lie in repeated blocks; compile=True compiles the whole"
    blocks = sum(len(run) for run in runs)
    return "blocks", f"{blocks} repeated blocks, which hold {share:.0%} of the parameters"


def _choose_device(model: nn.Module) -> tuple[str, str]:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type == "cuda":
        return str(parameter.device), f"{parameter.device}: the model is there"
    if torch.cuda.is_available():
        return "cuda", f"cuda: {torch.cuda.get_device_name()} was found"
    return "cpu", "cpu: torch finds no CUDA GPU"


def _check_precision(device: str, precision: str) -> None:
    if (
        precision == "bf16"
        and device.startswith("cuda")
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError(
            "TrainingConfig(precision='bf16'): this GPU has no bf16 units and would emulate it slowly; use 'fp16', "
            "'fp32' or 'auto'."
        )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"TrainingConfig(device={name!r}): one of 'auto', 'cpu', 'cuda', 'cuda:N' is needed.") from e
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"TrainingConfig(device={name!r}): this release trains on 'cpu' or one 'cuda' device.")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ConfigError(
            f"TrainingConfig(device={name!r}): torch finds {torch.cuda.device_count()} CUDA GPUs. Use device='cpu', or "
            "run `ds-doctor` to see why the GPU is missing."
        )


def _choose_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "bf16: this GPU has bf16 tensor cores; weights and optimizer states stay fp32"
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "fp16 with a gradient scaler: this GPU has fp16 but no bf16 tensor cores"
        return "fp32", "fp32: this GPU has no tensor cores, so half precision gains nothing"
    isa = probe().isa
    if "amx_bf16" in isa:
        return "bf16", "bf16: this CPU has AMX tiles for bf16; weights and optimizer states stay fp32"
    if "avx512_bf16" in isa:
        return "fp32", (
            "fp32: without AMX tiles the gain from bf16 depends on the model and costs digits; this CPU has "
            "avx512_bf16, so precision='bf16' is worth a try"
        )
    return "fp32", "fp32: this CPU has no bf16 units"
