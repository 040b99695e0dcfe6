"""A pruned module on disk: its weights with the plan that makes a fresh module fit them, in one safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..core import ArtifactError, InputError, atomic
from ._plan import PruningPlan

_KEY = "deepseek_r1.pruning_plan"


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the weights of what `R1Pruner.compress` made, and how it was cut; whole or not at all.

    Raises:
        InputError: another ending, or a module that was not pruned.

    Example:
        >>> import tempfile
        >>> from deepseek_r1.pruning import PruneConfig, R1Pruner
        >>> build = lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = R1Pruner(build(), sparsity=0.4, config=PruneConfig(timing_rounds=0)).compress()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_pruned(build(), save_pruned(small, f"{folder}/small.safetensors"))
        >>> again[0]
        Linear(in_features=8, out_features=16, bias=True)
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError(f"save_pruned({str(path)!r}): the name must end in .safetensors.")
    plan = getattr(model, "pruning_plan", None)
    if not isinstance(plan, PruningPlan):
        raise InputError("save_pruned needs what R1Pruner.compress returned; this module has no pruning_plan.")
    # Clones: two names may share one tensor, which the format refuses.
    state = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    atomic.write_bytes(target, save(state, metadata={_KEY: json.dumps(plan.to_dict())}))
    return target


def plan_in(path: str | os.PathLike[str]) -> PruningPlan | None:
    """The plan in a safetensors file; None if it has none.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as found:
            text = (found.metadata() or {}).get(_KEY)
        return None if text is None else PruningPlan.from_dict(json.loads(text))
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(f"{path} is damaged or no safetensors file: {e}") from e


def load_pruned(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A pruned copy of a fresh module, with the weights of a file by `save_pruned`; the module is left alone.

    Raises:
        ArtifactError: the file is damaged or has no plan.
        InputError: it is of another module.
    """
    plan = plan_in(path)
    if plan is None:
        raise ArtifactError(f"{path} has weights, but no plan of pruning; load it with load_state_dict.")
    result = plan.apply(model)
    try:
        result.load_state_dict({name: torch.as_tensor(t) for name, t in load_file(path).items()})
    except RuntimeError as e:
        raise InputError(f"{path} is of another module: {e}") from e
    result.pruning_plan = plan  # type: ignore[assignment]
    return result
