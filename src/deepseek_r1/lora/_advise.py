"""Which way of fine-tuning to take: by the number of samples, corrected by what fits. Trains nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core import ConfigError, Hardware, InputError, Report, probe
from ._config import ALL_LINEAR, LoraConfig
from ._memory import (
    METHODS,
    RANK,
    FinetuneEstimate,
    Sizes,
    by_method,
    estimate,
    sizes_from_count,
    sizes_of,
    speed,
    usable,
)

#: Below the first number of samples LoRA, up to the second QLoRA, above it everything is trained.
LORA_BELOW, FULL_ABOVE = 10_000, 100_000
_NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
#: What is tried where a method does not fit, in this order.
_INSTEAD = {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}


@dataclass(frozen=True, kw_only=True)
class FinetuneAdvice:
    """What `advise_finetune` found.

    Attributes:
        method: "full", "lora" or "qlora".
        reasons: why, in sentences.
        estimates: what each method needs; empty where no model was given.
        memory_bytes: that one device leaves for training.
        num_samples: that were asked about.
    """

    method: str
    reasons: tuple[str, ...]
    estimates: tuple[FinetuneEstimate, ...]
    memory_bytes: int
    num_samples: int

    @property
    def estimate(self) -> FinetuneEstimate | None:
        """What the chosen method needs."""
        return by_method(self.estimates).get(self.method)

    @property
    def fits(self) -> bool:
        """Whether the chosen method fits, as far as is known."""
        return self.estimate is None or self.estimate.fits

    @property
    def base_dtype(self) -> str | None:
        """For `get_peft_model(base_dtype=...)`: how the frozen weights are stored."""
        return {"full": None, "lora": "bf16", "qlora": "nf4"}[self.method]

    @property
    def config(self) -> LoraConfig | None:
        """Adapters to begin with; None for full fine-tuning."""
        if self.method == "full":
            return None
        return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ALL_LINEAR)

    def report(self) -> Report:
        """The advice as a Report: a row for each quantity of each method, and the reasons."""
        report = Report(f"Fine-tuning on {self.num_samples:,} samples")
        report.add("method", _NAMES[self.method], how="number of samples, then memory")
        for found in self.estimates:
            name = _NAMES[found.method]
            for what in ("weights", "gradients", "optimizer", "activations", "memory"):
                how = "all four" if what == "memory" else "state formula" if what != "activations" else "layer sizes"
                report.add(f"{name}: {what}", getattr(found, f"{what}_bytes") / 1e9, unit="GB", how=how)
            report.add(f"{name}: micro-batch", found.micro_batch_size, unit="samples", how="largest that fits")
            report.add(f"{name}: time", found.hours, unit="h", how="operations by speed; a rough guess")
        if self.estimate is not None:
            need, have = self.estimate.memory_bytes / 1e9, self.memory_bytes / 1e9
            report.check(f"{_NAMES[self.method]} fits", self.fits, f"{need:.1f} GB of {have:.1f} GB")
        for reason in self.reasons:
            report.note(reason)
        return report

    def __str__(self) -> str:
        return str(self.report())


def advise_finetune(
    num_samples: int, hardware: Hardware | None = None, model: nn.Module | int | None = None, *,
    batch_size: int = 8, sequence_length: int = 512, epochs: int = 3,
) -> FinetuneAdvice:  # fmt: skip
    """Choose between LoRA, QLoRA and training every weight, and say why.

    By the number of samples: below 10,000 LoRA, up to 100,000 QLoRA, above that full fine-tuning. What does not fit
    into the memory of one device gives way to what does. Memory and time are estimates from formulas (the states of
    AdamW under mixed precision, activations from the sizes of linear layers); nothing is run. Convolutions' activations
    are not counted.

    Args:
        hardware: None: this machine.
        model: a module (on the meta device too), or the number of a transformer's parameters. None: memory and time
            are left out.
        batch_size: samples in a step; smaller micro-batches are taken where memory asks for it.
        sequence_length: tokens in a sample; 1 for models that are no sequence models.
        epochs: of the run whose time is estimated.

    Raises:
        ConfigError: a number below one.
        InputError: a model without linear layers, or something that is no model.

    Example:
        >>> from deepseek_r1.core.hardware import Gpu, Hardware
        >>> gpu = Gpu(name="NVIDIA H200", memory_bytes=141 * 10**9, driver="", vendor="nvidia")
        >>> machine = Hardware(cpu="", architecture="", isa=(), cores=8, memory_bytes=10**11, system="", gpus=(gpu,))
        >>> advice = advise_finetune(200_000, machine, 7_000_000_000)
        >>> advice.method, advice.reasons[2]
        ('lora', 'LoRA does: 36.7 GB of 126.9 GB.')
    """
    for name, value in (
        ("num_samples", num_samples), ("batch_size", batch_size), ("sequence_length", sequence_length),
        ("epochs", epochs),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"advise_finetune({name}={value!r}): an integer >= 1 is needed.")
    machine = probe() if hardware is None else hardware
    if not isinstance(machine, Hardware):
        raise InputError(f"advise_finetune(hardware={type(machine).__name__}): a core.Hardware is needed.")
    memory, where = usable(machine)
    wanted, first = _by_samples(num_samples)
    if model is None:
        unknown = (first, "No model was given, so memory and time were not looked at.")
        return _advice(wanted, unknown, (), memory, num_samples)
    sizes = _sizes(model)
    flops, assumed = speed(machine)
    options = {"memory_bytes": memory, "batch_size": batch_size, "sequence_length": sequence_length,
               "samples": num_samples * epochs, "flops": flops}  # fmt: skip
    found = tuple(estimate(method, sizes, **options) for method in METHODS)  # type: ignore[arg-type]
    method, reasons = _fitting(wanted, by_method(found), memory, where)
    batch = by_method(found)[method].micro_batch_size
    if batch < batch_size and by_method(found)[method].fits:
        steps = -(-batch_size // batch)
        reasons += (f"Micro-batches of {batch} samples are needed for that ({steps} in a step of {batch_size}).",)
    return _advice(method, (first, *reasons, f"Time: {assumed}."), found, memory, num_samples)


def _advice(
    method: str, reasons: tuple[str, ...], found: tuple[FinetuneEstimate, ...], memory: float, samples: int
) -> FinetuneAdvice:
    return FinetuneAdvice(
        method=method, reasons=reasons, estimates=found, memory_bytes=round(memory), num_samples=samples
    )


def _sizes(model: nn.Module | int) -> Sizes:
    if isinstance(model, int) and not isinstance(model, bool) and model >= 1:
        return sizes_from_count(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"advise_finetune(model={model!r}): a torch.nn.Module or a number of parameters is needed.")
    sizes = sizes_of(model)
    if not sizes.linear:
        raise InputError("advise_finetune: the model has no linear layers, beside which adapters are put by default.")
    return sizes


def _by_samples(count: int) -> tuple[str, str]:
    if count < LORA_BELOW:
        return (
            "lora",
            f"{count:,} samples are below {LORA_BELOW:,}: a small adapter learns what they have: LoRA.",
        )
    if count <= FULL_ABOVE:
        return "qlora", (
            f"{count:,} samples are between {LORA_BELOW:,} and {FULL_ABOVE:,}: adapters hold what they teach, and "
            "4-bit weights leave memory for larger batches: QLoRA."
        )
    return "full", f"{count:,} samples are above {FULL_ABOVE:,}: enough to train every weight: full fine-tuning."


def _fitting(wanted: str, found: dict[str, FinetuneEstimate], memory: float, where: str) -> tuple[str, tuple[str, ...]]:
    def numbers(method: str) -> str:
        return f"{found[method].memory_bytes / 1e9:.1f} GB of {memory / 1e9:.1f} GB"

    if found[wanted].fits:
        more = ""
        if wanted == "qlora" and found["lora"].fits:
            more = f" LoRA would fit too ({numbers('lora')}) and takes less time a step."
        return wanted, (f"It fits: {numbers(wanted)} on {where}.{more}",)
    misses = [f"{_NAMES[wanted]} does not fit: {numbers(wanted)} on {where}, one sample at a time."]
    for method in _INSTEAD[wanted]:
        if found[method].fits:
            return method, (*misses, f"{_NAMES[method]} does: {numbers(method)}.")
        misses.append(f"{_NAMES[method]} does not either: {numbers(method)}.")
    last = "Take shorter sequences, recompute activations, several devices, or a smaller model."
    return "qlora", (*misses, f"Nothing fits; QLoRA needs least. {last}")
