"""One file per architecture, and the sources that turn outside files into modules. Knows nothing about training."""

from __future__ import annotations

from ._keras_load import load_keras
from ._onnx_load import load_onnx
from ._sources import SOURCES, load_factory
from ._tensorflow_load import load_tensorflow
from .digits import DigitsNet

__all__ = ["SOURCES", "DigitsNet", "load_factory", "load_keras", "load_onnx", "load_tensorflow"]
