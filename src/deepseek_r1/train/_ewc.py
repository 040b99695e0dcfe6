"""Elastic weight consolidation: a penalty that holds the weights that old data need.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
https://arxiv.org/abs/1612.00796. Knows nothing about the Trainer: it is a function of the model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core import ArtifactError, ConfigError, InputError, atomic
from ..data import batch_size, slice_batch, to_device, unpack_batch
from ._epoch import batches, check_loader, empty_loader
from ._evaluate import mode
from ._objective import LossFunction, Objective
from ._rng import preserved_rng

_KIND = "deepseek-r1 elastic weight consolidation"
_SCHEMA_VERSION = 1


class ElasticWeightConsolidation:
    """strength / 2 * sum(F * (w - w_old) ** 2) over all weights that are trained: a penalty for `Trainer(penalties=)`.

    F is the diagonal of the Fisher information on the old data, the mean of squared gradients of the loss, taken when
    this is made, at the weights w_old of that time, in evaluation mode. Parameters that the model gets later (as a
    new head) are free. For a third task, give the Trainer the penalties of both earlier ones.

    Args:
        model: the model, trained on the old data.
        loader: the old data, as for the Trainer.
        strength: how much the old data weigh; F is a mean over samples, so 1 weighs them like one sample each step.
            Values from 100 to 100,000 are common.
        loss: as for the Trainer; the default rule chooses if None. To be the Fisher information it must be a
            negative log-likelihood, as cross entropy is.
        max_samples: samples to look at, or None for all.
        per_sample: gradients are squared sample by sample, as the definition has it: one backward pass each. False
            squares each batch's mean gradient and multiplies by its size: as many times faster, and noisier.

    Raises:
        ConfigError: `strength` or `max_samples` is out of range.
        InputError: the loader is empty, no loss fits, or the model has nothing to train.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> old = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> penalty = ElasticWeightConsolidation(model, old, strength=10.0)
        >>> penalty(model).item()
        0.0
        >>> _ = nn.init.zeros_(model.weight)
        >>> penalty(model).item() > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        strength: float = 1000.0,
        loss: LossFunction | None = None,
        max_samples: int | None = None,
        per_sample: bool = True,
    ) -> None:
        self.strength = _checked_strength(strength)
        if max_samples is not None and (
            isinstance(max_samples, bool) or not isinstance(max_samples, int) or max_samples < 1
        ):
            raise ConfigError(f"ElasticWeightConsolidation(max_samples={max_samples!r}): an integer >= 1 is needed.")
        check_loader(loader, "loader")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise InputError(f"{type(model).__name__} has no parameter with requires_grad=True, so none can be held.")
        self.anchors = {name: p.detach().clone() for name, p in trained.items()}
        self.fisher, self.samples = _fisher(model, trained, loader, loss, max_samples, per_sample)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty at the model's present weights, a scalar that gradients flow through.

        Raises:
            InputError: the model lacks one of the parameters, or has it in another shape.
        """
        named = dict(model.named_parameters())
        terms = []
        for name, anchor in self.anchors.items():
            p = named.get(name)
            if p is None or p.shape != anchor.shape:
                what = "is not there" if p is None else f"is of shape {tuple(p.shape)}"
                raise InputError(
                    f"elastic weight consolidation holds the parameter {name!r} of shape {tuple(anchor.shape)}, which "
                    f"{what} in this model; make it from this model."
                )
            if anchor.device != p.device:
                anchor = self.anchors[name] = anchor.to(p.device)
                self.fisher[name] = self.fisher[name].to(p.device)
            terms.append((self.fisher[name] * (p - anchor).square()).sum())
        home = terms[0].device
        return 0.5 * self.strength * torch.stack([term.to(home) for term in terms]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Fisher information, old weights and strength; the tensors are its own. A Trainer's checkpoints have it."""
        return {
            "strength": self.strength, "samples": self.samples,
            "anchors": dict(self.anchors), "fisher": dict(self.fisher),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, in place of what this was made with."""
        self.strength, self.samples = float(state["strength"]), int(state["samples"])
        self.anchors, self.fisher = dict(state["anchors"]), dict(state["fisher"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write Fisher information and old weights to one safetensors file; whole or not at all."""
        target = Path(path)
        tensors = {
            f"{part}.{name}": value.cpu().contiguous()
            for part, values in (("fisher", self.fisher), ("anchor", self.anchors))
            for name, value in values.items()
        }
        about: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, "strength": self.strength, "samples": self.samples}
        about["names"] = list(self.anchors)
        with atomic.atomic_path(target) as tmp:
            save_file(tensors, tmp, metadata={"kind": _KIND, "about": json.dumps(about)})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, strength: float | None = None) -> ElasticWeightConsolidation:
        """Read what `save` wrote.

        Args:
            strength: another than the saved one.

        Raises:
            ArtifactError: the file is damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            about = json.loads(metadata["about"])
            if metadata["kind"] != _KIND or about["schema_version"] != _SCHEMA_VERSION:
                raise ValueError(f"it is {metadata['kind']!r}, version {about['schema_version']}")
            made = cls.__new__(cls)
            made.strength, made.samples = float(about["strength"]), int(about["samples"])
            made.fisher = {name: tensors["fisher." + name] for name in about["names"]}
            made.anchors = {name: tensors["anchor." + name] for name in about["names"]}
        except (SafetensorError, KeyError, ValueError, TypeError) as e:
            raise ArtifactError(f"{path} holds no elastic weight consolidation: {e}.") from e
        if strength is not None:
            made.strength = _checked_strength(strength)
        return made


def _checked_strength(strength: Any) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise ConfigError(f"ElasticWeightConsolidation(strength={strength!r}): a finite number >= 0 is needed.")
    return float(strength)


def _fisher(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    loader: Iterable[Any],
    loss: LossFunction | None,
    max_samples: int | None,
    per_sample: bool,
) -> tuple[dict[str, Tensor], int]:
    """The mean of squared gradients by parameter name, and the number of samples."""
    parameters = list(trained.values())
    device = parameters[0].device
    objective = Objective(model, loss)
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    seen = 0
    with preserved_rng(device), mode(model, False), torch.enable_grad():
        for batch in batches(loader, 0, device):
            if max_samples is not None and seen >= max_samples:
                break
            part = unpack_batch(batch)
            size = batch_size(part) if max_samples is None else min(batch_size(part), max_samples - seen)
            step = 1 if per_sample else size
            for start in range(0, size, step):
                args, kwargs, labels = to_device(slice_batch(part, start, start + step), device)
                value, _ = objective(model, args, kwargs, labels)
                grads = torch.autograd.grad(value, parameters, allow_unused=True)
                pairs = [(s, g.detach().to(s.dtype)) for s, g in zip(sums, grads, strict=True) if g is not None]
                # The mean over n samples has a variance n times smaller, and stands for n of them.
                torch._foreach_addcmul_([s for s, _ in pairs], *([g for _, g in pairs],) * 2, float(step * step))
            seen += size
    if seen == 0:
        raise empty_loader(loader)
    torch._foreach_div_(sums, float(seen))
    if not all(bool(torch.isfinite(s).all()) for s in sums):
        raise InputError("a gradient on the old data is not finite, so no Fisher information can be taken from it.")
    return dict(zip(trained, sums, strict=True)), seen
