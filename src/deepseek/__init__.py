"""The objects of `deepseek_r1` under the older names people know. Tables of strings and stubs, no logic.

    import deepseek
    from deepseek import load_model, nn

Importing this package imports neither torch nor anything else heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_r1.core.names import INNER_ROOMS, PUBLIC, ROOMS, TORCH_NN, TORCH_OPTIM, lazy_getattr

if TYPE_CHECKING:
    from deepseek_r1 import *  # noqa: F403

__getattr__ = lazy_getattr(__name__, PUBLIC, (*ROOMS, *INNER_ROOMS))


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC, *ROOMS, *INNER_ROOMS, *TORCH_NN, *TORCH_OPTIM})
