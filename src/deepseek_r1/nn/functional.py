"""`torch.nn.functional` itself under this package's name, so that `import deepseek_r1.nn.functional` works too."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch.nn.functional

if TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403

sys.modules[__name__] = torch.nn.functional
