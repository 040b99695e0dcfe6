"""From the facts of a machine to one verdict and one fix a line. Pure: looks at nothing but its argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

OK, WARN, FAIL, ABSENT = "ok", "warn", "fail", "not installed"
Facts = Mapping[str, Any]

PYTHON_MINIMUM = "3.11"
#: distribution -> (least version, what it is for); the slim install needs the first four, the rest comes with torch.
SLIM = {
    "numpy": ("1.26", "arrays"),
    "onnxruntime": ("1.20", "running exported models"),
    "rich": ("13", "tables and progress"),
    "typer": ("0.21", "the command line"),
}
TORCH_MINIMUM = "2.11"
WITH_TORCH = {
    "scipy": ("1.11", "solvers"),
    "safetensors": ("0.4", "weights and checkpoints"),
    "onnx": ("1.18", "ONNX export and import"),
    "onnxscript": ("0.5", "ONNX export"),
    "matplotlib": ("3.8", "figures of reports"),
    "scikit-learn": ("1.4", "the digits of the default recipe"),
}
#: distribution -> (least version, what for, the fix where it is absent)
OPTIONAL = {
    "pillow": ("10", "images as data", "pip install 'deepseek-r1[images]'"),
    "openvino": ("2024.0", "Intel's runtime", "pip install openvino"),
    "executorch": ("1.0", "models on phones", "pip install executorch"),
}
#: Distributions that bring the same module as onnxruntime.
ONNXRUNTIME_KINDS = ("onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
#: Least Linux driver by CUDA major version. Source: NVIDIA, CUDA Toolkit release notes, minor version compatibility.
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
_GET_TORCH = "choose the right build on pytorch.org/get-started and reinstall torch"
_INT8_ISA = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")
_BF16_ISA = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class Verdict:
    """One line: what was looked at, how it is ("ok", "warn", "fail", "not installed"), what was found, what to do."""

    subject: str
    state: str
    found: str
    fix: str = ""


def judge(facts: Facts) -> list[Verdict]:
    """All verdicts on a machine, from the ground up."""
    return [verdict for judge_one in _JUDGES for verdict in judge_one(facts)]


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version.

    Example:
        >>> numbers("2.13.0+cpu"), numbers("1.20rc1"), numbers("nightly")
        ((2, 13, 0), (1, 20), ())
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def older(version: str, minimum: str) -> bool:
    """Whether a version is older than another; 2.11 is not older than 2.11.0."""
    a, b = numbers(version), numbers(minimum)
    width = max(len(a), len(b))
    return a + (0,) * (width - len(a)) < b + (0,) * (width - len(b))


def arch_runs(arch: str, built: list[str]) -> bool:
    """Whether a GPU of `arch` can run a build for the architectures `built`.

    Machine code runs on the same major version from its minor version on; `compute_` code on anything later.

    Example:
        >>> arch_runs("sm_89", ["sm_80"]), arch_runs("sm_90", ["sm_80"]), arch_runs("sm_90", ["compute_80"])
        (True, False, True)
    """
    if not arch.startswith("sm_"):
        return arch in [name.partition(":")[0] for name in built]
    return any(_covers(name, int(arch.removeprefix("sm_"))) for name in built)


def _covers(name: str, gpu: int) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name)
    if match is None:
        return False
    version = int(match[2])
    if match[3] == "a":
        # sm_90a and its like use instructions of exactly that GPU.
        return version == gpu
    return version <= gpu and (match[1] == "compute" or version // 10 == gpu // 10)


def _python(facts: Facts) -> Iterator[Verdict]:
    found = facts["python"]
    if older(found, PYTHON_MINIMUM):
        fix = f"install Python {PYTHON_MINIMUM} or later and make a new virtual environment with it"
        yield Verdict("Python", FAIL, f"{found}; {PYTHON_MINIMUM} or later is needed", fix)
    else:
        yield Verdict("Python", OK, found)


def _cpu(facts: Facts) -> Iterator[Verdict]:
    isa, name = set(facts["isa"]), f"{facts['cpu']}, {facts['cores']} core(s)"
    if not isa:
        yield Verdict("CPU", OK, f"{name}; its instruction sets cannot be read on {facts['system']}")
        return
    int8 = ", ".join(i for i in _INT8_ISA if i in isa)
    bf16 = ", ".join(i for i in _BF16_ISA if i in isa)
    words = f"{name}; int8: {int8 or 'no own instructions'}; bf16: {bf16 or 'no own instructions'}"
    if facts["architecture"] in ("x86_64", "AMD64") and "avx2" not in isa:
        yield Verdict("CPU", WARN, f"{words}; no AVX2", "expect slow kernels, or use another machine")
    elif not int8:
        fix = "expect little from int8 on this machine, and measure it with: deepseek-r1 optimize"
        yield Verdict("CPU", WARN, words, fix)
    else:
        yield Verdict("CPU", OK, words)


def _memory(facts: Facts) -> Iterator[Verdict]:
    gigabytes = facts["memory_bytes"] / 1e9
    if 0 < gigabytes < 2:
        yield Verdict("memory", WARN, f"{gigabytes:.1f} GB", "use small batches, or a machine with 2 GB or more")
    else:
        yield Verdict("memory", OK, f"{gigabytes:.1f} GB" if gigabytes else "size not known")


def _disk(facts: Facts) -> Iterator[Verdict]:
    gigabytes = facts["disk_free_bytes"] / 1e9
    state = FAIL if gigabytes < 0.2 else WARN if gigabytes < 2 else OK
    yield Verdict("disk", state, f"{gigabytes:.1f} GB free here", "" if state == OK else "free some space")


def _torch(facts: Facts) -> Iterator[Verdict]:
    version, build = facts["packages"].get("torch"), facts["torch_build"]
    if version is None:
        found = "exported models run without it; training, quantising and exporting need it"
        yield Verdict("torch", ABSENT, found, f"pip install 'torch>={TORCH_MINIMUM}'")
    elif older(version, TORCH_MINIMUM):
        found = f"{version}; {TORCH_MINIMUM} or later is needed"
        yield Verdict("torch", FAIL, found, f"pip install --upgrade 'torch>={TORCH_MINIMUM}'")
    elif build is None:
        yield Verdict("torch", FAIL, f"{version}, with files missing", "pip install --force-reinstall torch")
    else:
        yield Verdict("torch", OK, f"{version}, built for {build}")


def _gpu(facts: Facts) -> Iterator[Verdict]:
    gpus, build = facts["gpus"], facts["torch_build"] or ""
    if not gpus:
        wanted = build.partition(" ")[0]
        if wanted in ("cuda", "rocm"):
            fix = f"if there is a GPU, install its driver; else nothing ({_GET_TORCH} to save disk space)"
            yield Verdict("GPU", WARN, f"none found, and torch is built for {build}", fix)
        else:
            yield Verdict("GPU", OK, "none; everything runs on the CPU")
        return
    for gpu in gpus:
        yield _one_gpu(gpu, build)


def _one_gpu(gpu: Mapping[str, str], build: str) -> Verdict:
    name, kind = f"{gpu['name']}, driver {gpu['driver'] or 'unknown'}", build.partition(" ")[0]
    wanted = {"nvidia": "cuda", "amd": "rocm"}[gpu["vendor"]]
    if not build:
        return Verdict("GPU", OK, name)
    if kind != wanted:
        return Verdict("GPU", WARN, f"{name}; unused, because torch is built for {build}", _GET_TORCH)
    if wanted == "cuda":
        least = DRIVERS.get((numbers(build.partition(" ")[2]) or (0,))[0])
        if least and gpu["driver"] and older(gpu["driver"], least):
            found = f"{name}; torch for {build} needs driver {least} or later"
            return Verdict("GPU", FAIL, found, f"update the NVIDIA driver, or {_GET_TORCH}")
    return Verdict("GPU", OK, f"{name}; torch is built for {build}")


def _check(facts: Facts) -> Iterator[Verdict]:
    check = facts.get("check")
    if check is None:
        return
    if "error" in check:
        yield Verdict("torch import", FAIL, f"failed in its own process: {check['error']}", _GET_TORCH)
        return
    state = OK if check["cpu"] == "ok" else FAIL
    yield Verdict("torch on CPU", state, f"matrix product: {check['cpu']}", "" if state == OK else _GET_TORCH)
    has_build = (facts["torch_build"] or "cpu") != "cpu"
    if facts["gpus"] and has_build and not check["cuda_available"]:
        fix = "run nvidia-smi or rocm-smi, and check the driver and the container's access to the device"
        yield Verdict("torch on GPU", FAIL, "torch sees no GPU, the driver's own tool does", fix)
    for gpu in check["gpus"]:
        if not arch_runs(gpu["arch"], check["arch_list"]):
            found = f"{gpu['name']} is {gpu['arch']}, torch is built for {', '.join(check['arch_list'])}"
            yield Verdict("torch on GPU", FAIL, found, _GET_TORCH)
        elif gpu["matmul"] != "ok":
            yield Verdict(
                "torch on GPU", FAIL, f"{gpu['name']}: {gpu['matmul']}", f"update the driver, or {_GET_TORCH}"
            )
        else:
            yield Verdict("torch on GPU", OK, f"{gpu['name']} ({gpu['arch']}): matrix product ok")


def _compiler(facts: Facts) -> Iterator[Verdict]:
    if facts["compiler"]:
        yield Verdict("C++ compiler", OK, facts["compiler"])
        return
    command = "xcode-select --install" if facts["system"] == "Darwin" else "apt install g++ (or your system's package)"
    yield Verdict("C++ compiler", WARN, "none; only torch.compile and C++ operators need one", command)


def _packages(facts: Facts) -> Iterator[Verdict]:
    packages = facts["packages"]
    has_torch = packages.get("torch") is not None
    kinds = [k for k in ONNXRUNTIME_KINDS if packages.get(k) is not None]
    for name, (minimum, purpose) in {**SLIM, **WITH_TORCH}.items():
        version = packages.get(name)
        if name == "onnxruntime" and kinds:
            yield _onnxruntime(version, kinds, packages)
        elif version is None:
            needed = name in SLIM or has_torch
            found = f"for {purpose}{'' if needed else '; comes into use with torch'}"
            if needed:
                found += "; needed, and not installed"
            yield Verdict(name, FAIL if needed else ABSENT, found, f"pip install '{name}>={minimum}'")
        else:
            yield _version(name, version, minimum)
    for name, (minimum, purpose, fix) in OPTIONAL.items():
        version = packages.get(name)
        if version is None:
            yield Verdict(name, ABSENT, f"for {purpose}", fix)
        else:
            yield _version(name, version, minimum)


def _version(name: str, version: str, minimum: str) -> Verdict:
    if older(version, minimum):
        fix = f"pip install --upgrade '{name}>={minimum}'"
        return Verdict(name, FAIL, f"{version}; {minimum} or later is needed", fix)
    return Verdict(name, OK, version)


def _onnxruntime(plain: str | None, kinds: list[str], packages: Mapping[str, str]) -> Verdict:
    if plain is not None or len(kinds) > 1:
        everything = ["onnxruntime"] * (plain is not None) + kinds
        fix = f"pip uninstall {' '.join(everything)}, then install one of them"
        return Verdict("onnxruntime", WARN, f"{' and '.join(everything)} overwrite each other's files", fix)
    return _version(kinds[0], packages[kinds[0]], SLIM["onnxruntime"][0])


_JUDGES: tuple[Callable[[Facts], Iterator[Verdict]], ...] = (
    _python, _cpu, _memory, _disk, _torch, _gpu, _check, _compiler, _packages,
)  # fmt: skip
