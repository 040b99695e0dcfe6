"""`build_op`: a C++ or CUDA source of operators to a shared library, with the compiler that is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core import DeepSeekError, InputError, atomic
from ._library import own_machine

_ENDINGS = (".cc", ".cpp", ".cxx", ".cu", ".c++")
_TARGETS = ("x86_64", "aarch64")
#: No flag here changes the value of an operation; `-ffast-math` would.
_FLAGS = ("-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
_PACKAGES = {
    "native": "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), or xcode-select --install (macOS)",
    "aarch64": "apt-get install g++-aarch64-linux-gnu (Debian, Ubuntu)",
    "x86_64": "apt-get install g++-x86-64-linux-gnu (Debian, Ubuntu)",
    "cuda": "the CUDA toolkit, https://developer.nvidia.com/cuda-downloads, with nvcc on the PATH",
}
_TIMEOUT_S = 900.0


class BuildError(DeepSeekError, RuntimeError):
    """A source of operators did not compile; the message has the compiler's errors with their lines."""


class MissingCompilerError(DeepSeekError, RuntimeError):
    """There is no compiler for what was asked; the message says what to install."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a source is compiled.

    Attributes:
        command: compiler and arguments, without the output's name.
        output: where the library goes.
    """

    command: tuple[str, ...]
    output: Path


def include_dir() -> Path:
    """The directory to give a compiler with `-I`.

    Example:
        >>> (include_dir() / "deepseek_r1" / "core" / "operator.h").is_file()
        True
    """
    return Path(__file__).resolve().parents[1] / "include"


def build_op(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    cuda: bool = False,
    target: str | None = None,
    march: str | None = None,
    compiler: str | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """Compile a source of operators to a shared library.

    Args:
        source: a C++ file that includes <deepseek_r1/core/operator.h>.
        output: the library; by default the source's name with .so, beside it. Written whole or not at all.
        cuda: compile with nvcc, for CPU and GPU; always so for a .cu file.
        target: "x86_64" or "aarch64" where that is not this machine.
        march: the instruction sets to use, as the compiler names them ("x86-64-v3", "armv8.2-a"; for CUDA the GPU's
            architecture, "sm_90"). By default this machine's, or the target's common ones.
        compiler: the compiler's command; by default g++ or clang++, nvcc, or the target's cross compiler.
        flags: more arguments for the compiler.

    Returns:
        The library's path.

    Raises:
        InputError: no such file, or arguments that do not go together.
        MissingCompilerError: the compiler is not there.
        BuildError: the source does not compile.
    """
    build = plan(source, output, cuda=cuda, target=target, march=march, compiler=compiler, flags=flags)
    with atomic.atomic_path(build.output) as temporary:
        command = [*build.command, "-o", str(temporary)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as e:
            raise BuildError(f"{source}: the compiler did not end within {_TIMEOUT_S:g} s.") from e
        if done.returncode:
            raise BuildError(_explain(Path(source), done.stderr or done.stdout))
    return build.output


def plan(
    source: str | os.PathLike[str], output: str | os.PathLike[str] | None, *, cuda: bool, target: str | None,
    march: str | None, compiler: str | None, flags: Sequence[str],
) -> Build:  # fmt: skip
    """The command that `build_op` runs. Raises as `build_op` does, but compiles nothing."""
    file = Path(source)
    if not file.is_file():
        raise InputError(f"{file} does not exist or is no file; give a C++ source.")
    if file.suffix not in _ENDINGS:
        raise InputError(f"{file}: a C++ source ends in {', '.join(_ENDINGS)}.")
    if target is not None and target not in _TARGETS:
        raise InputError(f"target={target!r}: one of {', '.join(_TARGETS)} is needed.")
    own = own_machine()
    cross = target if target != own else None
    cuda = cuda or file.suffix == ".cu"
    if cuda and cross:
        raise InputError(f"a CUDA library is built on the machine it runs on; cuda and target={target!r} exclude it.")
    out = file.with_suffix(".so") if output is None else Path(output)
    if out.resolve() == file.resolve() or out.is_dir():
        raise InputError(f"the library cannot be written to {out}; give another name.")
    found = _compiler(compiler, "cuda" if cuda else cross or "native")
    start: tuple[str, ...]
    if cuda:
        arch = f"-arch={march or 'native'}"
        host = ",".join((*_FLAGS, *_tuning("native", own)))
        # Two warnings of nvcc: on loops of the CPU side, and on methods that are overridden in part, as is meant.
        quiet = ("-diag-suppress", "20014,611")
        # Float division and square root to 2 and 3 units in the last place, as Inductor's kernels have them.
        fast = ("-prec-div=false", "-prec-sqrt=false")
        options = ("--extended-lambda", "--expt-relaxed-constexpr", "-Xcompiler", host, *quiet, *fast)
        start = (found, "-x", "cu", arch, *options)
    else:
        start = (found, *_FLAGS, *(_tuning(march, own) if march or not cross else ()))
    common = ("-std=c++17", "-O3", "-shared", "-I", str(include_dir()), *flags, str(file))
    return Build(command=(*start, *common), output=out)


def _tuning(march: str | None, machine: str) -> tuple[str, ...]:
    # On ARM, -mcpu=native names both architecture and tuning; -march=native is younger than many compilers there.
    if march is None or march == "native":
        return ("-mcpu=native",) if machine == "aarch64" else ("-march=native",)
    return (f"-march={march}",)


def _compiler(asked: str | None, kind: str) -> str:
    names = {
        "native": ("g++", "clang++", "c++"),
        "aarch64": ("aarch64-linux-gnu-g++",),
        "x86_64": ("x86_64-linux-gnu-g++",),
        "cuda": ("nvcc",),
    }[kind]
    for name in (asked,) if asked else names:
        if path := shutil.which(name):
            return path
    for place in ("/usr/local/cuda/bin/nvcc",) if kind == "cuda" and not asked else ():
        if Path(place).is_file():
            return place
    wanted = asked or " or ".join(names)
    raise MissingCompilerError(f"there is no {wanted} on the PATH, which this build needs. Install {_PACKAGES[kind]}.")


def _explain(source: Path, text: str) -> str:
    """The compiler's errors, those in the user's own file first; templates make the rest long."""
    lines = text.splitlines()
    mark = re.compile(r"(?:^|: |\): )(?:fatal )?error(?::| |\b)")
    heads = [i for i, line in enumerate(lines) if mark.search(line)]
    if not heads:
        return f"{source} does not compile:\n" + "\n".join(lines[-20:])
    shown = [_with_source(lines, i) for i in heads[:3]]
    name = source.name
    own = [line for line in lines if re.match(rf"\S*{re.escape(name)}[:(]\d+", line) and not mark.search(line)]
    asked = [f"  asked for by {line.strip()}" for line in own[:3]]
    more = [f"  ... and {len(heads) - 3} more errors"] if len(heads) > 3 else []
    return "\n".join([f"{source} does not compile:", *shown, *asked, *more])


def _with_source(lines: list[str], i: int) -> str:
    """An error's line and the source that the compiler prints below it."""
    below = []
    for line in lines[i + 1 : i + 4]:
        if not re.match(r"\s*\d*\s*\||\s{4,}", line):
            break
        below.append(line)
    return "\n".join([lines[i].strip(), *below])
