"""What `doctor` looks at: this machine and its packages as plain values. Judges nothing, and never imports torch."""

from __future__ import annotations

import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .hardware import probe, run_tool

_CHECK_TIMEOUT_S = 180
#: Runs in its own process: an import of torch that crashes or hangs must not take the doctor with it.
_CHECK = """
import json, torch
out = {"version": torch.__version__, "cuda_available": torch.cuda.is_available(), "arch_list": [], "gpus": []}
a = torch.arange(16.0).reshape(4, 4)
out["cpu"] = "ok" if torch.equal(a @ torch.eye(4), a) else "wrong result"
if out["cuda_available"]:
    out["arch_list"] = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        # CUDA builds have gcnArchName too, and it holds the card's name there.
        arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
        gpu = {"name": p.name, "arch": arch}
        try:
            b = a.to(f"cuda:{i}")
            gpu["matmul"] = "ok" if torch.equal((b @ b).cpu(), a @ a) else "wrong result"
        except Exception as e:
            gpu["matmul"] = f"{type(e).__name__}: {e}".splitlines()[0]
        out["gpus"].append(gpu)
print("\\n" + json.dumps(out))
"""


def gather(distributions: list[str], *, check_compatibility: bool = False) -> dict[str, Any]:
    """The facts of this machine; `_verdicts.judge` says what each means."""
    here = probe()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.system(),
        "architecture": here.architecture,
        "cpu": here.cpu,
        "isa": list(here.isa),
        "cores": here.cores,
        "memory_bytes": here.memory_bytes,
        "gpus": [{"name": g.name, "driver": g.driver, "vendor": g.vendor} for g in here.gpus],
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "packages": {name: installed_version(name) for name in distributions},
        "torch_build": torch_build(_torch_version_file()),
        "compiler": _compiler(),
    }
    if check_compatibility and facts["packages"]["torch"] is not None:
        facts["check"] = run_check([sys.executable, "-c", _CHECK], _CHECK_TIMEOUT_S)
    return facts


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None. Imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def torch_build(text: str) -> str | None:
    """What a torch was built for, from the text of its `version.py`: "cpu", "cuda 13.0", "rocm 6.4", or None.

    Example:
        >>> torch_build("cuda: Optional[str] = '13.0'\\nhip: Optional[str] = None")
        'cuda 13.0'
        >>> torch_build("cuda: Optional[str] = None\\nhip: Optional[str] = None")
        'cpu'
    """
    found = dict(re.findall(r"^(cuda|hip)\b[^=\n]*=\s*'([^']*)'", text, re.MULTILINE))
    if "hip" in found:
        return "rocm " + ".".join(found["hip"].split(".")[:2])
    if "cuda" in found:
        return f"cuda {found['cuda']}"
    return "cpu" if text else None


def run_check(command: list[str], timeout_s: float) -> dict[str, Any]:
    """Run the check's process; its JSON, or `{"error": ...}` if it crashed, hung or said nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:g} s"}
    if done.returncode < 0:
        return {"error": f"the process was killed by {signal.Signals(-done.returncode).name}"}
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines and done.returncode == 0 else None
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode} and no answer"])[-1]}


def _torch_version_file() -> str:
    try:
        found = metadata.distribution("torch").locate_file("torch/version.py")
        return Path(str(found)).read_text()
    except (metadata.PackageNotFoundError, OSError):
        return ""


def _compiler() -> str | None:
    for name in ("g++", "clang++", "c++"):
        lines = (run_tool(name, "--version") or "").splitlines()
        if lines:
            return f"{name}: {lines[0]}"
    return None
