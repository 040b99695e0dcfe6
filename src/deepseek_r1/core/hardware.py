"""What machine this is: CPU model and instruction sets, cores, memory, GPUs. Needs no torch.

GPU facts come from the vendor's own command (`nvidia-smi`, `rocm-smi`), so that a broken framework install still
gets a true answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
#: Instruction sets that change which kernel runs, in the names Linux gives them.
_ISA = (
    "sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "neon",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: name, memory in bytes, driver version, and vendor ("nvidia" or "amd")."""

    name: str
    memory_bytes: int
    driver: str
    vendor: str


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """This machine.

    Attributes:
        cores: CPU cores this process may use (affinity and cgroup quota counted in).
        memory_bytes: memory this process may use.
    """

    cpu: str
    architecture: str
    isa: tuple[str, ...]
    cores: int
    memory_bytes: int
    system: str
    gpus: tuple[Gpu, ...] = field(default=())
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> str:
        """16 hexadecimal digits that change when a measured choice may no longer hold."""
        kept = (self.cpu, self.architecture, self.isa, self.cores, [(g.name, g.driver) for g in self.gpus])
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the key."""
        return {**asdict(self), "isa": list(self.isa), "gpus": [asdict(g) for g in self.gpus], "key": self.key}

    def facts(self) -> dict[str, Any]:
        """The few lines a reader of a Report wants."""
        facts: dict[str, Any] = {
            "CPU": self.cpu,
            "instruction sets": ", ".join(self.isa) or "unknown",
            "cores": self.cores,
            "memory": f"{self.memory_bytes / 1e9:.1f} GB",
            "system": self.system,
        }
        if self.gpus:
            facts["GPU"] = ", ".join(f"{g.name} ({g.memory_bytes / 1e9:.0f} GB)" for g in self.gpus)
        return facts


@cache
def probe() -> Hardware:
    """Look at this machine (once in a process).

    Example:
        >>> probe().cores >= 1
        True
    """
    info = cpu_info(_read("/proc/cpuinfo"))
    return Hardware(
        cpu=info[0] or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        isa=info[1],
        cores=_cores(),
        memory_bytes=_memory(),
        system=f"{platform.system()} {platform.release()}",
        gpus=tuple(_nvidia() + _amd()),
    )


def cpu_info(text: str) -> tuple[str, tuple[str, ...]]:
    """CPU model and known instruction sets from the text of /proc/cpuinfo.

    Example:
        >>> cpu_info("model name : X 9\\nflags : fpu avx2 avx512_vnni")
        ('X 9', ('avx2', 'avx512_vnni'))
    """
    model, flags = "", set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Processor") and not model:
            model = value.strip()
        if name.strip() in ("flags", "Features"):
            flags.update(value.split())
    return model, tuple(f for f in _ISA if f in flags)


def nvidia_gpus(text: str) -> list[Gpu]:
    """GPUs from `nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader,nounits`.

    Example:
        >>> nvidia_gpus("NVIDIA H200, 143771, 580.1")[0].name
        'NVIDIA H200'
    """
    gpus = []
    for line in text.splitlines():
        parts = [p.strip() for p in line.split(",")]
        if len(parts) == 3 and parts[1].isdigit():
            gpus.append(Gpu(name=parts[0], memory_bytes=int(parts[1]) * 2**20, driver=parts[2], vendor="nvidia"))
    return gpus


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def _memory() -> int:
    total = 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() and total else total


def run_tool(*command: str, timeout_s: float = 10) -> str | None:
    """Standard output of a command, or None if it is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _nvidia() -> list[Gpu]:
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    return nvidia_gpus(run_tool(*query) or "")


def _amd() -> list[Gpu]:
    text = run_tool("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showdriverversion", "--json")
    return amd_gpus(text or "")


def amd_gpus(text: str) -> list[Gpu]:
    """GPUs from `rocm-smi --showproductname --showmeminfo vram --showdriverversion --json`.

    Example:
        >>> amd_gpus('{"card0": {"Card Series": "MI250", "VRAM Total Memory (B)": "64"}}')[0].name
        'MI250'
    """
    try:
        data = json.loads(text)
    except ValueError:
        return []
    driver = str(data.get("system", {}).get("Driver version", ""))
    gpus = []
    for name, card in sorted(data.items()):
        if not name.startswith("card"):
            continue
        title = card.get("Card Series") or card.get("Card series") or card.get("Card model") or name
        memory = str(card.get("VRAM Total Memory (B)", "0"))
        gpus.append(Gpu(name=title, memory_bytes=int(memory) if memory.isdigit() else 0, driver=driver, vendor="amd"))
    return gpus
