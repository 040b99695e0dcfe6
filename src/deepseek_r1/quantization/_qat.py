"""Quantisation-aware training: `R1Quantizer` trains a quantised program to answer as the float model does.

It starts from the post-training result, whose ranges, compensated weights and corrected biases are kept, and learns
weights and grids together, with the float model as the teacher. Knows no graph; the Trainer has the loop.

Sources: Bhalgat et al., LSQ+, 2020; Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule

from ..core import ConfigError, InputError, Int4Dynamic, Int4Weight, Int8Static, Int8Weight, LayerFormat, Report
from ..graph import Program, on_device
from ..graph.editing import own_weights
from ..train import Callback, Objective, Trainer, TrainingConfig
from ._fake import FakeActivation
from ._layers import find_layers
from ._ptq import PTQConfig
from ._qat_module import QATModule
from ._quantize import captured, quantize

_SCHEMES = ("symmetric", "affine")


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """Options of quantisation-aware training.

    Attributes:
        activation_bits: 8, or 32 for float activations. With 4-bit weights the 8 bits have a range for each row, found
            at each call; else one learned range for each value.
        weight_bits: 8 (a learned step for each output channel), or 4 (one for each group; linear layers only, all
            others get 8).
        quant_scheme: of the weights: "symmetric" (the zero point in the middle), or "affine" (a zero point for each
            group, 4 bits only, because engines' 8-bit kernels have none). Activations always have a zero point.
        group_size: weights that share a scale in 4 bits: 32, 64 or 128.
        distillation: share of the loss that is the distance to the float model's answers; the rest is the task's.
            Batches without labels are learned from by distillation alone.
        freeze: shares of the run after which the grids of activations, and then those of weights, stay as they are.
        calibration_batches: batches of the training data on which the post-training start is made.
        skip: parts of names of layers that stay float (they train all the same).

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> QATConfig(activation_bits=8, weight_bits=8, quant_scheme="symmetric").ptq().format.name
        'int8-static'
    """

    activation_bits: int = 8
    weight_bits: int = 8
    quant_scheme: str = "symmetric"
    group_size: int = 64
    distillation: float = 0.5
    freeze: tuple[float, float] = (0.5, 0.75)
    calibration_batches: int = 32
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("activation_bits", (8, 32)), ("weight_bits", (8, 4)), ("quant_scheme", _SCHEMES)):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in allowed:
                either = " or ".join(repr(v) for v in allowed)
                raise ConfigError(f"QATConfig({name}={value!r}): {either} is needed.")
        if self.quant_scheme == "affine" and self.weight_bits == 8:
            raise ConfigError('QATConfig(quant_scheme="affine", weight_bits=8): weights of 8 bits are "symmetric".')
        if not (_is_number(self.distillation) and 0 <= self.distillation <= 1):
            raise ConfigError(f"QATConfig(distillation={self.distillation!r}): a number from 0 to 1 is needed.")
        shares = self.freeze
        if not (isinstance(shares, tuple) and len(shares) == 2 and all(_is_number(s) and 0 <= s <= 1 for s in shares)):
            raise ConfigError(f"QATConfig(freeze={shares!r}): two shares of the run from 0 to 1 are needed.")
        Int4Weight(group_size=self.group_size)
        self.ptq()

    def ptq(self) -> PTQConfig:
        """Options of the post-training quantisation that training starts from."""
        fmt: LayerFormat
        if self.weight_bits == 4:
            kind = Int4Dynamic if self.activation_bits == 8 else Int4Weight
            fmt = kind(group_size=self.group_size, symmetric=self.quant_scheme == "symmetric")
        else:
            fmt = Int8Static() if self.activation_bits == 8 else Int8Weight()
        return PTQConfig(format=fmt, calibration_batches=self.calibration_batches, skip=self.skip)


class R1Quantizer:
    """Quantise a model by training.

    Args:
        model: a module, a float Program, a Program that `quantize` or `AutoQuantizer` made (with its formats), or a
            `QATModule`, which is trained further.
        bits: 8 or 4, of the weights; instead of `config`.
        config: see `QATConfig`.

    Attributes:
        module: after `fit`, the `QATModule`: `save`, `QATModule.load` and a new `R1Quantizer(module)` go on with it.

    Raises:
        ConfigError: other bits, or bits and a config that says something else.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> data = [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(4)]
        >>> program = R1Quantizer(net, bits=8).fit(data, epochs=2)
        >>> program.precision, program(data[0][0]).shape
        ('int8', torch.Size([16, 3]))
    """

    def __init__(self, model: Any, bits: int | None = None, config: QATConfig | None = None) -> None:
        if config is not None and not isinstance(config, QATConfig):
            raise ConfigError(f"R1Quantizer(config={type(config).__name__}): a QATConfig is needed.")
        if bits is not None and (isinstance(bits, bool) or bits not in (8, 4)):
            raise ConfigError(f"R1Quantizer(bits={bits!r}): 8 or 4 is needed.")
        if config is None:
            config = QATConfig(weight_bits=bits or 8)
        elif bits is not None and bits != config.weight_bits:
            raise ConfigError(
                f"R1Quantizer(bits={bits}, config=...): the config says weight_bits={config.weight_bits}."
            )
        if not isinstance(model, nn.Module | Program):
            raise InputError(f"R1Quantizer needs a torch.nn.Module or a Program, given {type(model).__name__}.")
        self.model, self.config = model, config
        self.module: QATModule | None = None

    def fit(
        self,
        train_loader: Iterable[Any],
        epochs: int = 5,
        *,
        val_loader: Iterable[Any] | None = None,
        lr: float = 1e-4,
        loss: Any = None,
        example_inputs: Any = None,
        training: TrainingConfig | None = None,
    ) -> Program:
        """Train, and give the quantised Program; it keeps its float parent.

        Args:
            train_loader: batches `(inputs, labels)`, mappings, or inputs alone, read once for each epoch.
            val_loader: judges float, post-training and trained answers; by default some of the training batches do,
                and the report says so.
            lr: learning rate of AdamW; it falls to 0 on a cosine.
            loss: a function of (outputs, labels); by default chosen as the Trainer does.
            example_inputs: inputs to capture a module with; by default the first batch.
            training: further options of the Trainer.

        Returns:
            The trained Program, or the post-training one if training made the loss worse; the report says which.

        Raises:
            InputError: the loader cannot be read twice, is empty, does not fit, or has no labels for a given `loss`.
            ConfigError: an option is not allowed.
            NonFiniteLossError: a loss or gradient is not finite.
        """
        if iter(train_loader) is train_loader:
            raise InputError(
                "R1Quantizer.fit(train_loader): an iterator gives its batches once, and they are read several times; "
                "give a DataLoader or a list."
            )
        options = training or TrainingConfig(schedule="cosine", save_every_epochs=None)
        if options.device == "auto":
            options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
        module = self._begin(train_loader, example_inputs, options.device)
        pair = _Distilled(module, Objective(module, loss), self.config.distillation, loss is not None)
        optimizer = torch.optim.AdamW(module.parameters(), lr=_positive(lr), weight_decay=0.0)
        freezing = _Freezing(module, self.config.freeze, epochs)
        trainer = Trainer(pair, train_loader, val_loader, config=options, optimizer=optimizer, callbacks=[freezing])
        judge = val_loader if val_loader is not None else list(islice(train_loader, self.config.calibration_batches))
        before = {name: value.detach().clone() for name, value in module.state_dict().items()}
        pair.judged = pair.teacher
        numbers = {"float": trainer.evaluate(judge)}
        pair.judged = pair.student
        numbers["start"] = trainer.evaluate(judge)
        trained = trainer.train(epochs)
        numbers["trained"] = trainer.evaluate(judge)
        better = _better(numbers["trained"], numbers["start"])
        if not better:
            module.load_state_dict(before)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        self.module = module
        report = self._report(numbers, better, val_loader is not None, pair)
        report.sections += [module.start.report, trained]
        return replace(on_device(module.to_program(), "cpu"), report=report)

    def _begin(self, loader: Iterable[Any], example_inputs: Any, device: str) -> QATModule:
        if isinstance(self.model, QATModule):
            return self.model
        start = self.model
        if not isinstance(start, Program) or start.precision == "fp32":
            program, _ = captured(start, loader, example_inputs)
            start = quantize(program, dataset=loader, config=self._formats(program))
        if start.parent is not None and device != "cpu":
            start = replace(on_device(start, device), parent=on_device(start.parent, device))
        return QATModule(start)

    def _formats(self, program: Program) -> PTQConfig:
        config = self.config.ptq()
        if self.config.weight_bits == 8:
            return config
        # What has no 4-bit form gets the 8-bit one, instead of staying float.
        other = replace(self.config, weight_bits=8, quant_scheme="symmetric").ptq().format
        from_graph = find_layers(program.module(), self.config.skip, Report(""))
        return replace(config, layers={one.name: other for one in from_graph if one.misfit(config.format)})

    def _report(self, numbers: dict[str, dict[str, float]], better: bool, held_out: bool, pair: _Distilled) -> Report:
        report = Report(f"quantisation-aware training of {pair.student.start.name}")
        how = "validation data" if held_out else "training batches; give val_loader= for others"
        kept = numbers["trained" if better else "start"]
        for name, value in kept.items():
            report.add(f"{name}, against float", value, before=numbers["float"][name], how=how)
            report.add(f"{name}, against post-training", value, before=numbers["start"][name], how=how)
        if not better:
            report.note("training made the loss worse than post-training quantisation left them; that is the result")
        what = pair.objective.name or "none: the batches have no labels"
        share = 1.0 if not pair.objective.name else self.config.distillation
        report.note(f"loss: {share:g} of distillation from the float model; of the task: {what}")
        return report


class _Distilled(nn.Module):
    """Student and teacher as one module whose output has its own loss, as the Trainer takes it.

    Attributes:
        judged: whose answers come out: the student's, or for comparison the teacher's.
    """

    def __init__(self, student: QATModule, objective: Objective, share: float, needs_labels: bool) -> None:
        super().__init__()
        assert student.start.parent is not None, "QATModule has seen to it"
        teacher: Any = student.start.parent.exported.module(check_guards=False)
        own_weights(teacher)
        self.student = student
        # A new GraphModule, because an exported one refuses train() and eval().
        self.teacher = GraphModule(teacher, teacher.graph).requires_grad_(False)
        self.objective = objective
        self._share, self._needs_labels = share, needs_labels
        self.judged: nn.Module = student

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        if labels is None and self._needs_labels:
            raise InputError(
                "R1Quantizer.fit(loss=...): the batches have no labels for it. Let the loader give (inputs, labels), "
                "or leave loss= out to learn from the float model alone."
            )
        with torch.no_grad():
            target = self.teacher(*args, **kwargs)
        if labels is None:
            output = self.judged(*args, **kwargs)
            return {"loss": _distance(output, target, ""), "logits": output}
        task, output = self.objective(self.judged, args, kwargs, labels)
        distance = _distance(output, target, self.objective.name)
        return {"loss": self._share * distance + (1 - self._share) * task, "logits": output}


def _distance(output: Any, target: Any, task: str) -> Tensor:
    """Between two answers: Kullback-Leibler divergence of classes, else squared distance as a share of the target."""
    leaves = [pytree.tree_leaves(v) for v in (output, target)]
    total: Tensor | None = None
    for found, wanted in zip(*leaves):
        if not isinstance(found, Tensor) or not found.is_floating_point():
            continue
        if task == "cross entropy":
            wanted, found = (F.log_softmax(v, 1) for v in (wanted, found))
            one = F.kl_div(found, wanted, log_target=True, reduction="none").sum(1).mean()
        else:
            one = (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
        total = one if total is None else total + one
    if total is None:
        raise InputError("R1Quantizer: the model gives no floating-point tensor, so there is nothing to learn from.")
    return total


class _Freezing(Callback):
    """Stops learning the grids of activations, then those of weights, so that the weights settle on fixed ones."""

    def __init__(self, module: QATModule, shares: tuple[float, float], epochs: int) -> None:
        self._module, self._shares, self._epochs = module, shares, epochs
        self._first, self._steps = 0, 0

    def on_train_start(self, trainer: Any) -> None:
        """Count the steps of the run, where the loader knows its length."""
        size = len(trainer.train_loader) if hasattr(trainer.train_loader, "__len__") else 0
        self._first = trainer.step
        self._steps = self._epochs * math.ceil(size / trainer.config.gradient_accumulation_steps)

    def on_step_end(self, trainer: Any) -> None:
        """Freeze what is due."""
        if self._steps:
            self._freeze((trainer.step - self._first) / self._steps)

    def on_epoch_end(self, trainer: Any) -> None:
        """Freeze what is due, by epochs."""
        self._freeze(trainer.epoch / self._epochs)

    def _freeze(self, done: float) -> None:
        for fake in self._module.fakes:
            if done >= self._shares[0 if isinstance(fake, FakeActivation) else 1]:
                for parameter in fake.grid():
                    parameter.requires_grad_(False)
                    parameter.grad = None


def _better(trained: dict[str, float], start: dict[str, float]) -> bool:
    """Whether training paid: by loss, because few samples tell an accuracy only roughly."""
    return math.isfinite(trained["loss"]) and trained["loss"] <= start["loss"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(lr: Any) -> float:
    if not _is_number(lr) or lr <= 0:
        raise ConfigError(f"R1Quantizer.fit(lr={lr!r}): a finite number > 0 is needed, such as 1e-4.")
    return float(lr)
