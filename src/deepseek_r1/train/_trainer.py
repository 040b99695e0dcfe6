"""`Trainer`: steps put together into epochs, with evaluation, callbacks, checkpoints and a Report.

Every part is a plain function or small class in the modules beside this one. Knows nothing about compression.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import deploy
from ..core import ConfigError, InputError, Report
from ._callbacks import Callback, check_callbacks
from ._checkpoint import Contents, config_of, gather, read, read_frozen
from ._config import TrainingConfig, resolve
from ._configured import configured
from ._ema import averaged, averaged_copy
from ._epoch import Place, check_loader, size_note, steps_in_epoch
from ._evaluate import evaluate, example_inputs, mode, placed, predict
from ._folder import find
from ._frozen import FrozenBase
from ._heap import kept_heap
from ._interrupt import Interrupts, Terminated
from ._loop import by_signal, expect_largest, interrupted, run
from ._objective import LossFunction, Objective, Penalty
from ._optim import OptimizerLike, make_optimizer
from ._pack import Copy
from ._progress import Progress
from ._rng import cpu_threads, deterministic_kernels, preserved_rng, seed_everything, set_rng_state
from ._saving import Saver
from ._schedule import config_lr_factor
from ._state import metrics, put_back, take
from ._stepper import Stepper, check_batch_size
from ._summary import run_notes, summarise
from ._watch import Watch
from ._weighted import weight_entries


class Trainer:
    """Trains a model in place on one device (CPU or one CUDA GPU).

    The model is on the device while a verb of the Trainer runs, and afterwards where it was; its parameters are
    changed by `train`, no copy is made. Its modules' training and evaluation modes are put back after every verb too.

    Args:
        model: any `nn.Module`.
        train_loader: a DataLoader or any iterable of batches that can be read once per epoch. A batch is
            `(inputs, labels)`, a dict with an optional "labels" entry, or inputs alone (see
            `deepseek_r1.data.unpack_batch`).
        val_loader: the same, for `evaluate` and for the validation after each epoch.
        lr: learning rate of the default optimizer, or of an optimizer given as a class.
        config: see `TrainingConfig`. What it leaves on "auto" is settled here, once; `Trainer.config` is the result.
        loss: a function of (outputs, labels) that gives the mean over the batch. None: chosen at the first batch
            (the model's own loss, cross entropy, binary cross entropy or mean squared error; see docs/training.md).
        optimizer: None ("adamw"), a name ("adamw8bit", "lion", "muon", ...; docs/optimizers.md), an optimizer, its
            class, or a function parameters -> optimizer.
        callbacks: instances of `Callback`.
        metrics: name -> function of (outputs, labels), used in evaluation. None: chosen like the loss.
        penalties: functions of the model, each giving a scalar that is added to the loss of every training step, such
            as `ElasticWeightConsolidation`. Evaluation leaves them out. What one with `state_dict` and
            `load_state_dict` holds is in checkpoints.

    Attributes:
        resume_with: what a run that was interrupted names as the way to go on, such as a command; by default the
            calls of `resume` and `train`.

    Raises:
        ConfigError, InputError: an argument cannot be used; the message says what can.

    Example:
        >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(3)]
        >>> trainer = Trainer(nn.Linear(4, 2), data, data, lr=1e-2)
        >>> report = trainer.train(epochs=2)
        >>> report["steps"].after, len(trainer.history)
        (6, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        lr: float = 2e-5,
        config: TrainingConfig | None = None,
        loss: LossFunction | None = None,
        optimizer: OptimizerLike | None = None,
        callbacks: Iterable[Callback] = (),
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        penalties: Iterable[Penalty] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"Trainer(model={type(model).__name__}): an nn.Module is needed.")
        given = TrainingConfig() if config is None else config
        if not isinstance(given, TrainingConfig):
            raise ConfigError(f"Trainer(config={type(given).__name__}): a TrainingConfig is needed.")
        self.config, self._reasons = resolve(given, model)
        self.device = torch.device(self.config.device)
        self.model = model
        check_loader(train_loader, "train_loader")
        if val_loader is not None:
            check_loader(val_loader, "val_loader")
        self.train_loader, self.val_loader = train_loader, val_loader
        self.metrics = metrics
        with placed(model, self.device):
            self.optimizer, self._reasons["optimizer"] = make_optimizer(model, lr, self.config, optimizer)
        self.callbacks = [*configured(self.config), *check_callbacks(callbacks)]
        self.resumed = False
        self.resume_with = ""
        self._restarted, self._validating = False, False
        self._objective = Objective(model, loss, penalties)
        self._saver = Saver(self.config)
        self._frozen = FrozenBase(self.config.save_frozen is False)
        self._stepper = Stepper(
            model, self.optimizer, self._objective, self.config,
            advice=self._saver.advice, may_compile=given.compile == "auto",
            limit_asked=given.memory_gb is not None,
        )  # fmt: skip
        self._place: Place | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._whole = True
        self._watch: Watch | None = None
        self._skipped: list[tuple[str, str]] = []
        self._interrupts = Interrupts()

    # What callbacks and users read.

    @property
    def _progress(self) -> Progress:
        return self._stepper.progress

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._progress.epoch

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per finished epoch: epoch, step, lr, train_loss, val_<metric>..., seconds."""
        return self._progress.history

    @property
    def losses(self) -> list[tuple[int, float]]:
        """The loss curve: (step, mean training loss since the point before), every `log_every` steps."""
        self._progress.read()
        return self._progress.points

    @property
    def ema_model(self) -> nn.Module:
        """A copy of the model with the moving averages of its parameters (`TrainingConfig.ema_decay`)."""
        return averaged_copy(self.callbacks, self.model)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside this context the model has the moving averages of its parameters, if they are kept."""
        return averaged(self.callbacks, self.model)

    # The verbs.

    def train(self, epochs: int = 3) -> Report:
        """Train for `epochs` epochs; after `resume`, up to `epochs` epochs counted from the run's beginning.

        Called again without `resume` it begins a new run with the model and optimizer as they are. With a `save_dir`
        checkpoints are written as configured, and one at the end.

        Raises:
            NonFiniteLossError: a loss or gradient is not finite. The step's update was not applied.
            InputError: the loader is empty, a batch is ragged, no default loss fits, a callback failed.
            CheckpointError: the disk refuses a checkpoint; earlier ones stand.
            KeyboardInterrupt: Ctrl-C. The step is finished and a checkpoint written first, if there is a `save_dir`.
            Terminated: SIGTERM; the same, and a script that does not catch it ends with exit code 0.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ConfigError(f"train(epochs={epochs!r}): an integer >= 1 is needed.")
        per_epoch = steps_in_epoch(self.train_loader, self.config.gradient_accumulation_steps)
        total = None if per_epoch is None else per_epoch * epochs
        config_lr_factor(0, total, self.config)
        check_batch_size(self.train_loader, self.config.micro_batch_size)
        self._begin_run()
        first = self.step
        with ExitStack() as stack:
            self._interrupts = stack.enter_context(Interrupts())
            stack.enter_context(placed(self.model, self.device))
            self._frozen.begin(self.model)
            stack.enter_context(mode(self.model, True))
            stack.enter_context(deterministic_kernels(self.config.deterministic))
            stack.enter_context(cpu_threads(self.config.threads))
            stack.enter_context(kept_heap(self.device))
            with preserved_rng(self.device):  # importing rich draws from python's generator
                watch = Watch(self, total, continued=self.resumed or self._restarted)
                self._watch = stack.enter_context(watch)
            stack.enter_context(self._stepper.running())
            expect_largest(self)
            try:
                run(self, self._progress.first_epoch + epochs, total, watch)
            except (KeyboardInterrupt, Terminated, InputError) as e:
                if not by_signal(self, e):
                    raise
                raise interrupted(self, epochs, self._interrupts.error(e)) from None
            finally:
                with self._interrupts.held():
                    self._saver.close()
                self.optimizer.zero_grad(set_to_none=True)
                self.resumed, self._restarted, self._watch = False, False, None
        return self._report(self.step - first)

    def evaluate(self, loader: Iterable[Any] | None = None) -> dict[str, float]:
        """Mean loss and metrics on a loader (default: `val_loader`), in evaluation and inference mode.

        Draws nothing from the global generators, so that training goes on as if it had not happened.

        Raises:
            InputError: there is no loader, it is empty, or its batches do not fit.
        """
        source = self.val_loader if loader is None else loader
        if source is None:
            raise InputError("evaluate() needs a loader: give one, or make the Trainer with val_loader=.")
        with placed(self.model, self.device), self.averaged():
            self._stepper.settle()
            return evaluate(
                self.model, source, self._objective, self.metrics, device=self.device, precision=self.config.precision,
                check=self._interrupts.check if self._validating else None,
            )  # fmt: skip

    def predict(self, loader: Iterable[Any]) -> Any:
        """The model's outputs for a whole loader, concatenated on the CPU (labels in the batches are ignored)."""
        with placed(self.model, self.device), self.averaged():
            self._stepper.settle()
            return predict(self.model, loader, device=self.device, precision=self.config.precision)

    def export(self, path: str | os.PathLike[str], **options: Any) -> Report:
        """Write the model for deployment (`model.onnx`, or a directory for an Artifact) through `deploy.export`.

        Example inputs are taken from the first batch of `val_loader` (or `train_loader`).

        Args:
            **options: as for `deepseek_r1.deploy.export` (target, dataset, labels, preprocessing, name, ...).
        """
        self._stepper.settle()
        self._stepper.release()
        if options.get("example_inputs") is None:
            loader = self.train_loader if self.val_loader is None else self.val_loader
            options["example_inputs"] = example_inputs(loader, self.device, weight_entries(self.model))
        place = next(self.model.parameters()).device
        with self.averaged(), mode(self.model, False), preserved_rng(self.device):
            try:
                return deploy.export(self.model.cpu(), path, **options)
            finally:
                self.model.to(place)

    def stop(self, reason: str = "stop() was called") -> None:
        """End the run after the present step (from a callback)."""
        self._progress.stopped = reason

    # Checkpoints.

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint from which `resume` goes on exactly; whole or not at all. It is there on return.

        Args:
            path: a new directory for it. None: under its step's name in `config.save_dir`, of whose checkpoints
                those that `keep_last` and `keep_best` do not keep are then deleted.

        Raises:
            ConfigError: neither a path nor a save_dir.
            CheckpointError: the file system refuses.
            InputError: called in the middle of a step, or the state holds what no checkpoint can.
        """
        if path is None and self.config.save_dir is None:
            raise ConfigError("save() needs a path, or TrainingConfig(save_dir=...).")
        self._check_whole()
        if path is not None:
            self._saver.write(Path(path), self._contents)
            return Path(path)
        self._saver.write_own(self.step, self._contents, wait=True)
        return self._saver.path_of(self.step)

    def resume(self, path: str | os.PathLike[str] | None = None, *, missing_ok: bool = False) -> Path | None:
        """Load a checkpoint; the next `train(epochs)` goes on from it to the run's end, to the bit on a CPU.

        Args:
            path: a checkpoint, or a directory of them (default: `config.save_dir`), of which the latest whole one is
                taken. Damaged ones are named in the next Report.
            missing_ok: give None where a directory has no checkpoint yet, instead of an error.

        Raises:
            ArtifactError: the checkpoint is damaged, or all in the directory are; the file is named.
            InputError: there is none, or it is of another model, optimizer or list of penalties; the first mismatch is
                named. So is the first frozen tensor that the checkpoint leaves out and the model has otherwise.
        """
        if path is None and self.config.save_dir is None:
            raise ConfigError("resume() needs a path, or TrainingConfig(save_dir=...).")
        self._saver.finish()
        found, refused = find(Path(path if path is not None else self.config.save_dir or "."), missing_ok)
        if found is None:
            self._restarted = True
            return None
        model_state, state = read(found)
        # The optimizer's state is put where the parameters are.
        with placed(self.model, self.device):
            self._frozen.begin(self.model)
            put_back(self, found.name, model_state, state, read_frozen(found))
        self._whole, self.resumed = True, True
        if self.config.save_dir is not None and found == self._saver.path_of(self.step):
            self._saver.saved_step = self.step
        self._skipped += [(str(bad), why) for bad, why in refused.items()]
        return found

    def _contents(self, copy: Copy | None) -> Contents:
        state, frozen = self._frozen.split(self.model)
        return gather(
            state, take(self), self.step,
            config=config_of(self.model), metrics=metrics(self), copy=copy, frozen=frozen,
        )  # fmt: skip

    def _check_whole(self) -> None:
        self._stepper.settle()
        if not self._whole:
            raise InputError(
                "the last step did not end, so the state is not whole and cannot be saved for an exact resumption; "
                "resume() from the last checkpoint. (The weights alone: torch.save(model.state_dict(), ...).)"
            )

    # The run.

    def _begin_run(self) -> None:
        self._whole = True
        self._stepper.forget()
        if self.resumed:
            assert self._place is not None, "resume() sets the place"
            set_rng_state(self._place.rng, self.device)
        else:
            for name in ("resumed", "lr"):
                self._reasons.pop(name, None)
            self._place, self._epoch_start = None, None
            self._progress.begin_run()
            if self.config.seed is not None:
                seed_everything(self.config.seed)
        self._saver.begin(self.step, {name for name, _ in self._skipped})

    def _report(self, taken: int) -> Report:
        state, c = self._progress, self.config
        state.read()
        if self._stepper.graphs:
            self._reasons["cuda_graph"] = self._stepper.graphs
        if (memory := self._stepper.memory) is not None and memory.reason:
            self._reasons["memory"] = memory.reason
        notes = run_notes(self._reasons, self._objective, state, taken)
        if note := size_note(self.train_loader):
            notes.append(note)
        report = summarise(
            history=[e for e in state.history if e["epoch"] > state.first_epoch],
            losses=[(step, value) for step, value in self.losses if step > state.first_step],
            steps=state.step - state.first_step, samples=state.samples, seconds=state.seconds,
            metric=c.early_stop_metric, mode=c.early_stop_mode, notes=notes,
            skipped=[*self._skipped, *self._saver.skipped],
            facts={"device": c.device, "precision": c.precision, "torch": str(torch.__version__)},
        )  # fmt: skip
        report.sections += memory.reports if memory is not None else []
        return report
