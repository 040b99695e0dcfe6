"""Whether a saved state is of this model and this optimizer, said before anything is changed. Knows no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..core import InputError
from ._frozen import Left, check_frozen


def check_model(
    model: nn.Module, saved: Mapping[str, Any], where: str, frozen: Mapping[str, Left] | None = None
) -> None:
    """Raise InputError unless `saved` has the names and shapes of the model's state; the first mismatch is named.

    Args:
        frozen: what was left out, which the model must have with the same values.

    Example:
        >>> check_model(nn.Linear(2, 3), nn.Linear(2, 3).state_dict(), "run/step-00000001")
    """
    left = frozen or {}
    found = list(_differences({k: v for k, v in model.state_dict().items() if k not in left}, saved))
    if found:
        raise InputError(
            f"{where} is of another model: {found[0]}{_more(len(found) - 1)}. Build the model as the run that wrote it "
            "did."
        )
    check_frozen(model, left, where)


def _more(count: int) -> str:
    return f" (and {count} more difference{'s' if count > 1 else ''})" if count else ""


def _differences(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        shape = f" of the shape {tuple(value.shape)}" if isinstance(value, Tensor) and not is_lazy(value) else ""
        if name not in saved:
            yield f"the model has {name!r}{shape}, which the checkpoint has not"
        elif shape and isinstance(saved[name], Tensor) and saved[name].shape != value.shape:
            yield (
                f"{name!r} has the shape {tuple(saved[name].shape)} in the checkpoint and {tuple(value.shape)} in the "
                "model"
            )
    for name in saved:
        if name not in wanted:
            shape = f" of the shape {tuple(saved[name].shape)}" if isinstance(saved[name], Tensor) else ""
            yield f"the checkpoint has {name!r}{shape}, which the model has not"


def check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], kind: str | None, where: str) -> None:
    """Raise InputError unless `saved` is the state of such an optimizer over as many parameters.

    Args:
        kind: the class name of the optimizer that was saved; None if it is not known.
    """
    own = type(optimizer).__name__
    if kind is not None and kind != own:
        raise InputError(f"{where} has the state of the optimizer {kind}, not of {own}; train with {kind}.")
    before, now = ([len(group["params"]) for group in groups] for groups in (saved["param_groups"], _groups(optimizer)))
    if before != now:
        raise InputError(
            f"{where} is of another optimizer: its parameter groups hold {before} parameters, those of this {own} "
            f"{now}. Make it over the same parameters as the run did."
        )


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return optimizer.state_dict()["param_groups"]  # type: ignore[no-any-return]
