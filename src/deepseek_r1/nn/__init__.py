"""Layers: everything `torch.nn` has, plus what torch lacks. Knows nothing about training or engines.

Own names win over torch's where both exist (`Sequential`); `QuantizedLinear`, `CastLinear` and `NF4Linear` torch does
not have; everything else here *is* torch's object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn

from ._frozen import CastLinear, NF4Linear
from ._quantized import QuantizedLinear
from ._sequential import Sequential

if TYPE_CHECKING:
    from torch.nn import *  # type: ignore[assignment]  # noqa: F403

__all__ = ["CastLinear", "NF4Linear", "QuantizedLinear", "Sequential"]
__all__ += [name for name in dir(torch.nn) if not name.startswith("_") and name not in __all__]


def __getattr__(name: str) -> Any:
    if not name.startswith("__") and hasattr(torch.nn, name):
        return getattr(torch.nn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; neither has torch.nn {torch.__version__}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
