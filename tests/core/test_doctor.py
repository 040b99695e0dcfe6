"""The doctor on recorded machines, and on this one."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deepseek_r1.core import _facts
from deepseek_r1.core import _verdicts as v
from deepseek_r1.core.doctor import _DISTRIBUTIONS, examine, report

PACKAGES = {
    "torch": "2.13.0+cpu", "numpy": "2.4.6", "onnxruntime": "1.31.1", "rich": "15.0.0", "typer": "0.29.2",
    "scipy": "1.17.1", "safetensors": "0.8.0", "onnx": "1.23.2", "onnxscript": "0.7.2", "matplotlib": "3.11.2",
    "scikit-learn": "1.9.1", "pillow": "13.0.0",
}  # fmt: skip
SERVER = {
    "python": "3.11.7", "system": "Linux", "architecture": "x86_64", "cpu": "AMD EPYC 9454", "cores": 2,
    "isa": ["avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"], "memory_bytes": 16 * 10**9, "gpus": [],
    "disk_free_bytes": 80 * 10**9, "packages": PACKAGES, "torch_build": "cpu", "compiler": "g++: g++ 12.2.0",
}  # fmt: skip
H200 = {"name": "NVIDIA H200", "driver": "580.126.09", "vendor": "nvidia"}
T4_OLD = {"name": "Tesla T4", "driver": "470.82.01", "vendor": "nvidia"}
MI300 = {"name": "AMD Instinct MI300X", "driver": "6.12.12", "vendor": "amd"}


def machine(packages=None, **changes):
    return {**SERVER, **changes, "packages": {**PACKAGES, **(packages or {})}}


def gpu_check(arch, built, matmul="ok", available=True):
    gpus = [{"name": "GPU", "arch": arch, "matmul": matmul}] if available else []
    return {"version": "2.13.0", "cuda_available": available, "arch_list": built, "gpus": gpus, "cpu": "ok"}


CUDA13 = {"packages": {"torch": "2.13.0"}, "torch_build": "cuda 13.0"}
SLIM = dict.fromkeys(["torch", "scipy", "safetensors", "onnx", "onnxscript", "matplotlib", "scikit-learn", "pillow"])

#: name -> (facts, whether nothing is wrong, {subject: (verdict, words of what was found and the fix)})
MACHINES = {
    "server, CPU only": (machine(), True, {"torch": ("ok", "built for cpu"), "GPU": ("ok", "none")}),
    "slim install without torch": (
        machine(SLIM, torch_build=None),
        True,
        {"torch": ("not installed", "pip install 'torch>="), "scipy": ("not installed", "comes into use with torch")},
    ),
    "CPU build beside a GPU": (machine(gpus=[H200]), True, {"GPU": ("warn", "unused, because torch is built for cpu")}),
    "H200 with the right build": (machine(**CUDA13, gpus=[H200]), True, {"GPU": ("ok", "H200")}),
    "driver too old": (
        machine(**CUDA13, gpus=[T4_OLD]),
        False,
        {"GPU": ("fail", "needs driver 580.65.06 or later. Fix: update the NVIDIA driver")},
    ),
    "GPU too old for the build": (
        machine(**CUDA13, gpus=[H200], check=gpu_check("sm_70", ["sm_75", "sm_80", "sm_90", "compute_90"])),
        False,
        {"torch on GPU": ("fail", "is sm_70, torch is built for sm_75, sm_80")},
    ),
    "GPU checked and right": (
        machine(**CUDA13, gpus=[H200], check=gpu_check("sm_90", ["sm_80", "sm_90"])),
        True,
        {"torch on GPU": ("ok", "matrix product ok")},
    ),
    "kernel fails on the GPU": (
        machine(**CUDA13, gpus=[H200], check=gpu_check("sm_90", ["sm_90"], matmul="AcceleratorError: no image")),
        False,
        {"torch on GPU": ("fail", "AcceleratorError: no image. Fix: update the driver")},
    ),
    "container without the device": (
        machine(**CUDA13, gpus=[H200], check=gpu_check("", [], available=False)),
        False,
        {"torch on GPU": ("fail", "torch sees no GPU")},
    ),
    "CUDA build, no GPU": (machine(**CUDA13), True, {"GPU": ("warn", "none found, and torch is built for cuda 13.0")}),
    "ROCm, right": (
        machine({"torch": "2.13.0+rocm6.4"}, torch_build="rocm 6.4", gpus=[MI300]),
        True,
        {"GPU": ("ok", "MI300X")},
    ),
    "ROCm, checked": (
        machine(torch_build="rocm 6.4", gpus=[MI300], check=gpu_check("gfx942", ["gfx90a", "gfx942:sramecc+"])),
        True,
        {"torch on GPU": ("ok", "gfx942")},
    ),
    "AMD GPU with a CUDA build": (machine(**CUDA13, gpus=[MI300]), True, {"GPU": ("warn", "unused")}),
    "no compiler": (machine(compiler=None), True, {"C++ compiler": ("warn", "apt install g++")}),
    "no compiler on a Mac": (
        machine(compiler=None, system="Darwin", architecture="arm64", isa=[]),
        True,
        {"C++ compiler": ("warn", "xcode-select"), "CPU": ("ok", "cannot be read on Darwin")},
    ),
    "old Python": (machine(python="3.9.18"), False, {"Python": ("fail", "3.11 or later")}),
    "old torch": (machine({"torch": "2.2.1"}), False, {"torch": ("fail", "pip install --upgrade 'torch>=2.11'")}),
    "torch with files missing": (machine(torch_build=None), False, {"torch": ("fail", "--force-reinstall torch")}),
    "torch that crashes": (
        machine(check={"error": "the process was killed by SIGILL"}),
        False,
        {"torch import": ("fail", "SIGILL")},
    ),
    "old onnxruntime": (
        machine({"onnxruntime": "1.16.3"}),
        False,
        {"onnxruntime": ("fail", "pip install --upgrade 'onnxruntime>=1.20'")},
    ),
    "onnxruntime for GPUs": (
        machine({"onnxruntime": None, "onnxruntime-gpu": "1.22.0"}),
        True,
        {"onnxruntime-gpu": ("ok", "1.22.0")},
    ),
    "two onnxruntimes": (
        machine({"onnxruntime-gpu": "1.22.0"}),
        True,
        {"onnxruntime": ("warn", "pip uninstall onnxruntime onnxruntime-gpu")},
    ),
    "no onnxruntime": (machine({"onnxruntime": None}), False, {"onnxruntime": ("fail", "needed, and not installed")}),
    "torch without the rest": (machine({"onnx": None}), False, {"onnx": ("fail", "pip install 'onnx>=1.18'")}),
    "old CPU": (machine(isa=["sse4_2", "avx"]), True, {"CPU": ("warn", "no AVX2")}),
    "CPU without int8": (machine(isa=["avx2", "fma"]), True, {"CPU": ("warn", "expect little from int8")}),
    "ARM server": (
        machine(architecture="aarch64", isa=["asimd", "asimddp", "i8mm", "bf16"]),
        True,
        {"CPU": ("ok", "int8: i8mm, asimddp; bf16: bf16")},
    ),
    "full disk": (machine(disk_free_bytes=10**7), False, {"disk": ("fail", "free some space")}),
    "little memory": (machine(memory_bytes=10**9), True, {"memory": ("warn", "small batches")}),
}


@pytest.mark.tiny
@pytest.mark.parametrize("name", MACHINES)
def test_recorded_machines(name):
    facts, ok, expected = MACHINES[name]
    got = report(facts)
    assert got.ok is ok, str(got)
    for subject, (verdict, words) in expected.items():
        assert got[subject].after == verdict
        assert words in got[subject].how


@pytest.mark.tiny
@pytest.mark.parametrize("name", MACHINES)
def test_what_is_wrong_comes_with_a_fix_and_what_is_right_without(name):
    for verdict in v.judge(MACHINES[name][0]):
        assert verdict.state in ("ok", "warn", "fail", "not installed")
        assert bool(verdict.fix) == (verdict.state != "ok"), verdict


@pytest.mark.tiny
def test_the_minima_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    written = dict(re.fullmatch(r"([a-z-]+)>=([\d.]+)", d).groups() for d in project["dependencies"])
    ours = {name: minimum for name, (minimum, _) in {**v.SLIM, **v.WITH_TORCH}.items()}
    assert {**ours, "torch": v.TORCH_MINIMUM} == written
    assert project["requires-python"] == f">={v.PYTHON_MINIMUM}"
    assert f"pillow>={v.OPTIONAL['pillow'][0]}" in project["optional-dependencies"]["images"]


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("arch", "built", "runs"),
    [
        ("sm_86", ["sm_80"], True),
        ("sm_80", ["sm_86"], False),
        ("sm_120", ["sm_90", "compute_90"], True),
        ("sm_120", ["sm_100"], False),
        ("sm_90", ["sm_90a"], True),
        ("sm_100", ["sm_90a", "compute_90a"], False),
        ("gfx1100", ["gfx90a"], False),
    ],
)
def test_which_architectures_a_build_runs_on(arch, built, runs):
    assert v.arch_runs(arch, built) is runs


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "SIGABRT"),
        ("import time; time.sleep(60)", "no answer within"),
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("print('chatter')", "no answer"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_check_that_dies_is_an_answer_too(code, words):
    answer = _facts.run_check([sys.executable, "-c", code], timeout_s=1)
    assert words in answer["error"]


def test_this_machine_with_the_check():
    result = examine(check_compatibility=True)
    assert result["torch on CPU"].after == "ok"
    assert result["torch"].how.startswith(_facts.installed_version("torch"))
    assert {"Python", "CPU", "memory", "disk", "GPU", "C++ compiler", "onnxruntime", "pillow"} <= {
        row.metric for row in result.rows
    }


def test_the_build_read_from_the_file_is_the_build_torch_reports():
    import torch

    build = _facts.gather(_DISTRIBUTIONS)["torch_build"]
    assert build == (f"cuda {torch.version.cuda}" if torch.version.cuda else "cpu")


@pytest.mark.gpu
def test_a_real_gpu_computes_and_its_architecture_is_known():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    row = examine(check_compatibility=True)["torch on GPU"]
    assert row.after == "ok", row.how
    assert "sm_" in row.how or "gfx" in row.how


def test_it_imports_no_torch():
    code = "import sys; from deepseek_r1.core.doctor import examine; examine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
