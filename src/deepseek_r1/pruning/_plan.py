"""`PruningPlan`: which indices of which tensors stay, and which integers follow; applied to a module by slicing.

Knows no graph: a plan is plain numbers, so it can be saved beside the weights and applied to a fresh module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core import InputError

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What pruning keeps of a module.

    Attributes:
        tensors: name of a parameter or buffer -> dimension -> indices that stay, ascending.
        attributes: (module, attribute, place in a tuple or None) -> its new value.

    Example:
        >>> plan = PruningPlan(tensors={"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "1.weight": {1: [0, 2]}})
        >>> plan.apply(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
    """

    tensors: Mapping[str, Mapping[int, list[int]]] = field(default_factory=dict)
    attributes: Mapping[tuple[str, str, int | None], int] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of the module with what the plan keeps of it; the module is left alone.

        Raises:
            InputError: the plan is of another module, or the module was pruned already.
        """
        result = copy.deepcopy(model)
        self.apply_(result)
        return result

    def apply_(self, model: nn.Module) -> None:
        """Changes `model`: cuts its tensors and sets its integers. Tied tensors stay tied."""
        made: dict[int, torch.Tensor] = {}
        changed: dict[str, nn.Module] = {}
        known = _stores(model)
        for name, cuts in self.tensors.items():
            if name not in known:
                raise InputError(f"the plan cuts {name!r}, which the module does not have; it is of another module.")
            tensor = known[name]
            if id(tensor) not in made:
                made[id(tensor)] = _cut(name, tensor, cuts)
        for name, tensor in known.items():
            if id(tensor) in made:
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                store = module._parameters if leaf in module._parameters else module._buffers
                store[leaf] = made[id(tensor)]  # type: ignore[assignment]
                changed[owner] = module
        for (owner, attribute, place), value in self.attributes.items():
            _set(model.get_submodule(owner), attribute, place, value)
        for module in changed.values():
            follow_(module)

    def then(self, later: PruningPlan) -> PruningPlan:
        """One plan for what both do, one after the other.

        Example:
            >>> first, later = (PruningPlan(tensors={"w": {0: kept}}) for kept in ([1, 3, 5], [0, 2]))
            >>> first.then(later).tensors["w"]
            {0: [1, 5]}
        """
        tensors = {name: dict(cuts) for name, cuts in self.tensors.items()}
        for name, cuts in later.tensors.items():
            mine = tensors.setdefault(name, {})
            for dim, kept in cuts.items():
                mine[dim] = [mine[dim][i] for i in kept] if dim in mine else list(kept)
        return PruningPlan(tensors=tensors, attributes={**self.attributes, **later.attributes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "tensors": {name: {str(d): kept for d, kept in cuts.items()} for name, cuts in self.tensors.items()},
            "attributes": [[*where, value] for where, value in self.attributes.items()],
        }

    @classmethod
    def from_dict(cls, data: Any) -> PruningPlan:
        """The plan that `to_dict` described.

        Raises:
            InputError: it is none, or one of a later version.
        """
        try:
            if data["schema_version"] > SCHEMA_VERSION:
                raise InputError(f"the plan has version {data['schema_version']}; update deepseek-r1 to read it.")
            tensors = {
                str(name): {int(d): [int(i) for i in kept] for d, kept in cuts.items()}
                for name, cuts in data["tensors"].items()
            }
            attributes = {(str(m), str(a), None if p is None else int(p)): int(v) for m, a, p, v in data["attributes"]}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"no plan of pruning: {e!r}.") from e
        return cls(tensors=tensors, attributes=attributes)


def _stores(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _cut(name: str, tensor: torch.Tensor, cuts: Mapping[int, list[int]]) -> torch.Tensor:
    value = tensor.detach()
    for dim, kept in cuts.items():
        if dim >= value.ndim or (kept and kept[-1] >= value.shape[dim]):
            raise InputError(
                f"the plan keeps index {kept[-1]} of dimension {dim} of {name!r}, of shape {tuple(tensor.shape)}: "
                "it is of another module, or this one was pruned already."
            )
        value = value.index_select(dim, torch.tensor(kept, device=value.device))
    value = value.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _set(module: nn.Module, attribute: str, place: int | None, value: int) -> None:
    if not hasattr(module, attribute):
        raise InputError(f"the plan sets {attribute!r} of a {type(module).__name__}, which has no such attribute.")
    if place is None:
        setattr(module, attribute, value)
        return
    old = getattr(module, attribute)
    setattr(module, attribute, type(old)(value if i == place else v for i, v in enumerate(old)))


def follow_(module: nn.Module) -> None:
    """Changes one of torch's own layers: its sizes follow its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = module.weight if module.weight is not None else module.running_mean
        module.num_features = known.shape[0] if known is not None else module.num_features
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
