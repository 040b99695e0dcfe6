"""Engines run a Program; `optimize` races them and keeps the fastest that is right. Knows no data format and no file.

An engine does not know where a Program came from.
"""

from __future__ import annotations

from ._cache import ChoiceCache, default_root
from ._config import RaceConfig
from ._eager import on_one_thread
from ._onnx import to_onnx
from ._onnx_dynamic import INT8_DYNAMIC
from ._optimize import optimize
from .base import ENGINES, Engine, OperatorTime, Profile, Runner, compile_program
from .executable import Executable

__all__ = [
    "ENGINES",
    "INT8_DYNAMIC",
    "ChoiceCache",
    "Engine",
    "Executable",
    "OperatorTime",
    "Profile",
    "RaceConfig",
    "Runner",
    "compile_program",
    "default_root",
    "on_one_thread",
    "optimize",
    "to_onnx",
]
