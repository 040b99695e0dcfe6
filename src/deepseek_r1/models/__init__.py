"""One file per architecture, and the sources that turn outside files into modules. Knows nothing about training."""

from __future__ import annotations

from ._counting import num_parameters, transformer_flops
from ._hf_load import load_hf
from ._keras_load import load_keras
from ._losses import classification_loss
from ._onnx_load import load_onnx
from ._pretrained import PretrainedModel
from ._sources import SOURCES, load_factory
from ._tensorflow_load import load_tensorflow
from .bert import BERTConfig, BERTForSequenceClassification
from .digits import DigitsNet
from .gpt2 import GPT2, GPT2Config
from .llama import Llama, LlamaConfig
from .mobilenet_v2 import MobileNetV2, MobileNetV2Config
from .resnet import ResNet, ResNetConfig
from .vit import ViT, ViTConfig

__all__ = [
    "GPT2",
    "SOURCES",
    "BERTConfig",
    "BERTForSequenceClassification",
    "DigitsNet",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "MobileNetV2",
    "MobileNetV2Config",
    "PretrainedModel",
    "ResNet",
    "ResNetConfig",
    "ViT",
    "ViTConfig",
    "classification_loss",
    "load_factory",
    "load_hf",
    "load_keras",
    "load_onnx",
    "load_tensorflow",
    "num_parameters",
    "transformer_flops",
]
