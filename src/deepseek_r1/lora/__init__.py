"""Low-rank adapters on a model (LoRA, rsLoRA, DoRA), also over a base of 4 bits (QLoRA), with PEFT's names and files.

Knows modules and their layers. Knows nothing about the Trainer: a model with adapters is a module like others.
"""

from __future__ import annotations

from ._config import LoraConfig
from ._entry import get_peft_model
from ._layer import LoraLayer
from ._linear import LoraLinear
from ._model import PeftModel
from ._others import LoraConv, LoraEmbedding
from ._quantize import load_base, quantize_base, save_base

__all__ = [
    "LoraConfig",
    "LoraConv",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "PeftModel",
    "get_peft_model",
    "load_base",
    "quantize_base",
    "save_base",
]
