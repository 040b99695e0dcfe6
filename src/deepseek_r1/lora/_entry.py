"""`get_peft_model`: adapters put into a model, over a base of fewer bits if wanted."""

from __future__ import annotations

import re
import warnings

from torch import nn

from ..core import InputError
from ._config import LoraConfig, as_config
from ._model import PeftModel
from ._put import checked, outline
from ._quantize import quantize_base
from ._targets import find_targets, output_layer, saved_modules, unmatched


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", *, autocast_adapter_dtype: bool = True,
    base_dtype: str | None = None,
) -> PeftModel:  # fmt: skip
    """Changes the model: puts adapters beside its layers and freezes the rest. Gives it in a wrapper with the verbs.

    Args:
        model: any model; its layers are frozen in place, no copy is made.
        peft_config: which layers, and what kind of adapters; PEFT's own LoraConfig is taken too.
        adapter_name: of the first adapter.
        autocast_adapter_dtype: keep adapters in float32 where the model is in half precision, as is best for training.
        base_dtype: store all frozen linear layers in fewer bits first: "bf16", "fp16", "nf4" or "int4", see
            `quantize_base`. None leaves them.

    Raises:
        ConfigError, InputError: the config fits no layer, or an argument cannot be used.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> peft = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        >>> peft.print_trainable_parameters()
        trained: 96 of 772 parameters (12.4 %)
        (96, 772)
    """
    if isinstance(model, PeftModel):
        raise InputError("the model has adapters already; model.add_adapter(name, config) adds one.")
    peft_config = as_config(peft_config, "get_peft_model(peft_config")
    found = PeftModel(checked(model))
    before = {id(p): p.requires_grad for p in model.parameters()}
    modules = outline(model)
    # Whatever cannot work is said before a weight is rounded.
    find_targets(modules, peft_config, output_layer(model))
    if lost := unmatched(modules, peft_config):
        warnings.warn(lost, stacklevel=2)
    if base_dtype is not None:
        whole = saved_modules(modules, peft_config)
        quantize_base(model, base_dtype, exclude_modules="|".join(rf"{re.escape(p)}(\..*)?" for p in whole) or None)
    try:
        found.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
    except Exception:
        for parameter in model.parameters():
            parameter.requires_grad_(before.get(id(parameter), False))
        raise
    found.set_adapter(adapter_name)
    return found
