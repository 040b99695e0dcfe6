"""What a checkpoint of a Trainer holds: taken from the Trainer, and put back into one. Knows nothing about files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..core import InputError
from ._epoch import Place, epoch_start
from ._fit import check_model, check_optimizer
from ._frozen import Left
from ._objective import Penalty, penalty_name
from ._progress import Progress
from ._rng import loader_state, rng_state, set_loader_state
from ._summary import differences

if TYPE_CHECKING:
    from ._trainer import Trainer


def take(trainer: Trainer) -> dict[str, Any]:
    """Everything but the model's weights that the rest of the run depends on."""
    between_epochs = trainer._epoch_start is None
    scaler = trainer._stepper.scaler
    return {
        "progress": trainer._progress.to_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "optimizer_class": type(trainer.optimizer).__name__,
        "base_lrs": trainer._stepper.base_lrs,
        "scaler": None if scaler is None else scaler.state_dict(),
        "rng": rng_state(trainer.device),
        "epoch_start": epoch_start(trainer.train_loader, trainer.device) if between_epochs else trainer._epoch_start,
        "val_loader": None if trainer.val_loader is None else loader_state(trainer.val_loader),
        "callbacks": [{"class": type(c).__name__, "state": c.state_dict()} for c in trainer.callbacks],
        "penalties": [{"name": penalty_name(p), "state": _penalty_state(p)} for p in trainer._objective.penalties],
        "config": asdict(trainer.config),
        "batch_size": getattr(trainer.train_loader, "batch_size", None),
    }


def metrics(trainer: Trainer) -> dict[str, float]:
    """The numbers of the epoch that ended with the present step; none in the middle of an epoch."""
    last = trainer.history[-1] if trainer.history else {}
    if last.get("step") != trainer.step or trainer._progress.batch:
        return {}
    return {name: value for name, value in last.items() if name == "train_loss" or name.startswith("val_")}


def put_back(
    trainer: Trainer, name: str, model_state: Mapping[str, Any], state: Mapping[str, Any], frozen: Mapping[str, Left]
) -> None:
    """Give a Trainer the state that another one had.

    Args:
        name: the checkpoint's, for messages.
        frozen: what was left out of the model's state.

    Raises:
        InputError: it is of another model or optimizer; then nothing was changed.
    """
    stepper = trainer._stepper
    check_model(trainer.model, model_state, name, frozen)
    check_optimizer(trainer.optimizer, state["optimizer"], state.get("optimizer_class"), name)
    _check_penalties(trainer._objective.penalties, state.get("penalties"), name)
    try:
        trainer.model.load_state_dict(model_state, strict=not frozen)
        trainer.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as e:
        raise InputError(f"{name} is of another model or optimizer: {e}") from e
    for penalty, saved in zip(trainer._objective.penalties, state.get("penalties", ()), strict=False):
        if saved["state"] is not None:
            penalty.load_state_dict(saved["state"])  # type: ignore[attr-defined]
    if stepper.scaler is not None and state["scaler"] is not None:
        stepper.scaler.load_state_dict(state["scaler"])
    given, stepper.base_lrs = stepper.base_lrs, state["base_lrs"]
    stepper.progress = Progress.from_dict(state["progress"])
    trainer._place = Place(state["epoch_start"], stepper.progress.batch, state["rng"])
    if trainer.val_loader is not None and state["val_loader"] is not None:
        set_loader_state(trainer.val_loader, state["val_loader"])
    trainer._skipped = _load_callbacks(trainer, state["callbacks"])
    trainer._reasons["resumed"] = f"from {name} (step {trainer.step})" + differences(
        state["config"], asdict(trainer.config),
        state.get("batch_size"), getattr(trainer.train_loader, "batch_size", None),
    )  # fmt: skip
    if given != stepper.base_lrs:
        kept, asked = (f"{rates[0]:g}" for rates in (stepper.base_lrs, given))
        reason = trainer._reasons["optimizer"]
        trainer._reasons["optimizer"] = reason.replace(f"lr {asked}", f"lr {kept}")
        trainer._reasons["lr"] = f"{kept} as the run began with, not {asked} as given; for another begin a new run"
    stepper.forget()


def _penalty_state(penalty: Penalty) -> Any:
    """What a penalty has beside its code, or None: a function of the model has nothing."""
    has = callable(getattr(penalty, "state_dict", None)) and callable(getattr(penalty, "load_state_dict", None))
    return penalty.state_dict() if has else None  # type: ignore[attr-defined]


def _check_penalties(given: list[Penalty], saved: list[dict[str, Any]] | None, name: str) -> None:
    """Raise InputError unless a Trainer has the penalties that the run had. Checkpoints of before do not say (None)."""
    mine = [penalty_name(p) for p in given]
    if saved is not None and mine != (theirs := [entry["name"] for entry in saved]):
        raise InputError(
            f"{name} is of a run with the penalties {theirs}, and this Trainer has {mine}; give it the same in "
            "Trainer(penalties=...). What those with a state_dict hold is taken from the checkpoint."
        )


def _load_callbacks(trainer: Trainer, saved: list[dict[str, Any]]) -> list[tuple[str, str]]:
    skipped: list[tuple[str, str]] = []
    for i, entry in enumerate(saved):
        if i < len(trainer.callbacks) and type(trainer.callbacks[i]).__name__ == entry["class"]:
            trainer.callbacks[i].load_state_dict(entry["state"])
        else:
            skipped.append((f"state of callback {entry['class']}", "this Trainer has no such callback"))
    return skipped
