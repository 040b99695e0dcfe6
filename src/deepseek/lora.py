"""`deepseek_r1.lora` under the older package name: the same objects, looked up when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_r1.core.names import mirror

if TYPE_CHECKING:
    from deepseek_r1.lora import *  # noqa: F403

__getattr__, __dir__ = mirror(__name__, "deepseek_r1.lora")
