"""The words everyone shares. Never imports torch.

`Budget`, `Report`, number formats, the `Artifact` format and its reader, errors, the hardware probe, the plug-in
`Registry`, names.
"""

from __future__ import annotations

from .artifact import Artifact, Manifest, TensorSpec, open_artifact, write_artifact
from .budget import Budget
from .errors import (
    ArtifactError,
    CaptureError,
    CheckFailedError,
    ConfigError,
    DeepSeekError,
    InputError,
    MissingExtraError,
    NonFiniteLossError,
    PluginError,
    UnsafeFileError,
    UnsupportedOpError,
)
from .formats import (
    FORMATS,
    INT8_ACTIVATION,
    INT8_WEIGHT,
    PRECISIONS,
    QUANTISED,
    UINT4,
    BFloat16,
    Float32,
    Int4Dynamic,
    Int4Format,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
    IntFormat,
    LayerFormat,
)
from .hardware import Hardware, probe
from .plugins import Registry
from .report import Check, Plot, Report, Row

__all__ = [
    "FORMATS",
    "INT8_ACTIVATION",
    "INT8_WEIGHT",
    "PRECISIONS",
    "QUANTISED",
    "UINT4",
    "Artifact",
    "ArtifactError",
    "BFloat16",
    "Budget",
    "CaptureError",
    "Check",
    "CheckFailedError",
    "ConfigError",
    "DeepSeekError",
    "Float32",
    "Hardware",
    "InputError",
    "Int4Dynamic",
    "Int4Format",
    "Int4Weight",
    "Int8Dynamic",
    "Int8Static",
    "Int8Weight",
    "IntFormat",
    "LayerFormat",
    "Manifest",
    "MissingExtraError",
    "NonFiniteLossError",
    "Plot",
    "PluginError",
    "Registry",
    "Report",
    "Row",
    "TensorSpec",
    "UnsafeFileError",
    "UnsupportedOpError",
    "open_artifact",
    "probe",
    "write_artifact",
]
