"""Importing does nothing: no torch where none is needed, no settings changed anywhere."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import deepseek
import deepseek_r1

HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "scipy", "sklearn", "matplotlib", "safetensors", "pandas")
LIGHT = ("deepseek_r1", "deepseek_r1.core", "deepseek_r1.runtime", "deepseek_r1.cli", "deepseek")


def _all_modules() -> list[str]:
    found = []
    for package in (deepseek_r1, deepseek):
        found.append(package.__name__)
        walk = pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda _: None)
        found += [m.name for m in walk if not m.name.endswith("__main__")]
    return found


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", LIGHT)
def test_light_packages_stay_light(module):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.partition(".")[0] for name in json.loads(_run(code))}
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("package", ["core", "runtime"])
def test_every_module_of_the_torch_free_rooms(package):
    names = [n for n in _all_modules() if n.startswith(f"deepseek_r1.{package}.")]
    assert names
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    _run(code + "assert 'torch' not in sys.modules")


def test_unknown_names_load_no_torch():
    _run(
        "import sys, deepseek_r1 as dr1\n"
        "assert not hasattr(dr1, 'nothing_like_it') and not hasattr(dr1, '__wrapped__')\n"
        "dir(dr1)\n"
        "assert 'torch' not in sys.modules"
    )


def test_importing_every_module_changes_nothing():
    # Third parties first: what they do to the process is not ours to answer for.
    code = f"""
import importlib, json, logging, os, signal, sys, threading, warnings, locale
import torch, onnx, onnxruntime, onnxscript, matplotlib, matplotlib.figure, rich.console, rich.progress, typer
import scipy, sklearn.datasets, safetensors.torch, torch.export, torch.onnx, torch._inductor.config, torch.fx
import numpy as np

def state():
    return {{
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "excepthook": repr(sys.excepthook),
        "filters": [repr(f) for f in warnings.filters],
        "root handlers": [repr(h) for h in logging.root.handlers],
        "root level": logging.root.level,
        "torch log": (logging.getLogger("torch").level, len(logging.getLogger("torch").handlers)),
        "own log": {{n: len(l.handlers) for n, l in logging.root.manager.loggerDict.items()
                     if n.startswith("deepseek") and isinstance(l, logging.Logger)}},
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "benchmark": torch.backends.cudnn.benchmark,
        "engine": torch.backends.quantized.engine,
        "rng": (int(torch.initial_seed()), hash(torch.get_rng_state().numpy().tobytes())),
        "numpy rng": hash(np.random.get_state()[1].tobytes()),
        "numpy errors": np.geterr(),
        "backend": matplotlib.get_backend(auto_select=False) if "auto_select" in
            matplotlib.get_backend.__code__.co_varnames else None,
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "more threads": threading.active_count(),
        "locale": locale.setlocale(locale.LC_ALL),
    }}

before = state()
for name in {_all_modules()!r}:
    importlib.import_module(name)
    after = state()
    changed = {{k: (before[k], after[k]) for k in before if before[k] != after[k]}}
    assert not changed, (name, changed)
assert not [m for m in sys.modules if m.startswith("deepseek_r1") and sys.modules[m] is None]
"""
    assert _run(code) == "", "importing prints nothing"


def test_every_module_was_found():
    names = _all_modules()
    assert {"deepseek_r1.core.report", "deepseek_r1.models.digits", "deepseek.nn.functional"} <= set(names)
    assert len(names) > 40
