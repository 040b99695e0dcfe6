"""Low-rank adapters on a model (LoRA, rsLoRA, DoRA), also over a base of 4 bits (QLoRA), with PEFT's names and files.

Knows modules and their layers, and what the ways of fine-tuning need. Knows nothing about the Trainer: a model with
adapters is a module like others.
"""

from __future__ import annotations

from ._advise import FinetuneAdvice, advise_finetune
from ._config import LoraConfig
from ._entry import get_peft_model
from ._layer import LoraLayer
from ._linear import LoraLinear
from ._memory import FinetuneEstimate
from ._model import PeftModel
from ._others import LoraConv, LoraEmbedding
from ._quantize import load_base, quantize_base, save_base

__all__ = [
    "FinetuneAdvice",
    "FinetuneEstimate",
    "LoraConfig",
    "LoraConv",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "PeftModel",
    "advise_finetune",
    "get_peft_model",
    "load_base",
    "quantize_base",
    "save_base",
]
