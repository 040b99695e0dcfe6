"""Layers with adapters put into a model and taken out again: paths, replacement, shared weights. Knows no files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core import InputError
from ._layer import LoraLayer
from ._linear import LoraLinear
from ._others import LoraConv, LoraEmbedding
from ._saved import SavedModule
from ._targets import is_linear

_HALF = (torch.float16, torch.bfloat16)


def outline(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the paths that they had before adapters were put in; what is trained in full has no inner ones.

    Example:
        >>> list(outline(nn.Sequential(nn.Linear(2, 2), LoraLinear(nn.Linear(2, 2)))))
        ['0', '1']
    """
    found: dict[str, nn.Module] = {}
    closed: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(closed or "\0"):
            continue
        found[path] = module
        if isinstance(module, LoraLayer | SavedModule):
            found[path] = module.base_layer if isinstance(module, LoraLayer) else module.original_module
            closed = (*closed, f"{path}.")
    return found


def layer_for(module: nn.Module, path: str) -> LoraLayer:
    """The layer with adapters for a plain one.

    Raises:
        InputError: a kind of layer, or a setting of one, that adapters do not fit.
    """
    try:
        if is_linear(module):
            return LoraLinear(module)
        return LoraEmbedding(module) if isinstance(module, nn.Embedding) else LoraConv(module)
    except InputError as e:
        raise InputError(f"{path}: {e}") from e


def adapter_dtype(layer: nn.Module, autocast_adapter_dtype: bool) -> torch.dtype:
    """The type of an adapter's parameters: that of the layer's weight, but float32 for half precision and integers."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return torch.float32
    return torch.float32 if weight.dtype in _HALF and autocast_adapter_dtype else weight.dtype


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Changes the model: `new` stands wherever `old` stood."""
    for module in list(model.modules()):
        if module is not new:
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new


def shared_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules hold."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def checked(model: Any) -> nn.Module:
    """The model, if adapters can be put into it.

    Raises:
        InputError: no module, or it is a layer itself.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"get_peft_model(model={type(model).__name__}): a torch.nn.Module is needed.")
    if not any(True for _ in model.children()):
        raise InputError(
            f"the model is a single {type(model).__name__}; adapters go beside layers inside of a model, so put it "
            "into one: torch.nn.Sequential(layer)."
        )
    return model
