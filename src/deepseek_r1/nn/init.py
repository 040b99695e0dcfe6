"""`torch.nn.init` itself under this package's name, so that `import deepseek_r1.nn.init` works too."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch.nn.init

if TYPE_CHECKING:
    from torch.nn.init import *  # noqa: F403

sys.modules[__name__] = torch.nn.init
