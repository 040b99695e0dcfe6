"""PyTorch's own compiler as an engine: AOTInductor writes machine code once, and opening it compiles nothing.

For programs on the CPU (C++ and oneDNN kernels, with the weights folded into the package ("freezing"), which is where
most of its speed there comes from) and on CUDA, where the code is kept in another form, see `_inductor_cuda`.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from ..core import QUANTISED, probe
from ..graph import Program, rewrite
from ..graph.quiet import quiet_torch
from . import _inductor_cuda
from ._cast import cannot_cast, cast
from ._float_weights import float_groups
from ._inductor_cuda import open_runner
from ._refusals import changes_state, devices, eager_where, is_empty, unrolls
from .base import Engine, Runner

_q = torch.ops.quantized_decomposed
PACKAGE = "model.pt2"
#: Entry points of oneDNN's integer products and convolutions, as the generated C++ code calls them.
_INTEGER_CALL = re.compile(r"aoti_torch_cpu__q(?:conv|linear)_\w+\(")


class InductorEngine(Engine):
    """Compiles with AOTInductor.

    The code is made for as many threads as PyTorch has while it compiles.
    """

    name = "inductor"

    def unavailable(self) -> str:
        """Needs a C++ compiler while it compiles."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"the C++ compiler {compiler!r} was not found: install g++, or name another in CXX"
        return ""

    def unsupported(self, program: Program) -> str:
        """One kind of device, no state, and no recurrent layer of any length."""
        kinds = devices(program)
        if len(kinds) > 1:
            return f"its tensors are on {' and '.join(sorted(kinds))}"
        if program.precision in QUANTISED and kinds != {"cpu"}:
            return "it has integer kernels for quantised programs on the CPU only"
        return changes_state(program) or unrolls(program)

    def precisions(self, program: Program) -> list[str]:
        """Lower floating-point types where the hardware computes in them."""
        if cannot_cast(program):
            return [program.precision]
        if devices(program) == {"cuda"}:
            return [program.precision, "bf16", "fp16"]
        fast = {"avx512_bf16", "amx_bf16"} & set(probe().isa)
        return [program.precision, *(["bf16"] if fast else [])]

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Compile to a package of machine code and weights."""
        if precision != program.precision:
            program = cast(program, precision)
        elif precision in QUANTISED:
            program = retarget(program)
        if devices(program) == {"cuda"}:
            _inductor_cuda.build(_contiguous(program), folder)
        else:
            package(program, folder / PACKAGE)

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Load the machine code."""
        # Kernels divide by sizes, some of them; a batch of nothing is not worth a kernel.
        on_cpu = (folder / PACKAGE).exists()
        return eager_where(is_empty, package_runner(folder / PACKAGE) if on_cpu else open_runner(folder), program)

    def integer_kernels(self, folder: Path) -> int:
        """How many products and convolutions the compiled code does in integers."""
        with zipfile.ZipFile(folder / PACKAGE) as archive:
            sources = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp")]
        return sum(len(_INTEGER_CALL.findall(text)) for text in sources)


def package(program: Program, path: Path, **options: Any) -> None:
    """Compile a program with AOTInductor into one file; `options` are Inductor's."""
    exported = _contiguous(program).exported
    with quiet_torch(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs={"freezing": True, **options}
        )


def package_runner(path: Path) -> Runner:
    """The compiled function behind a package, on flat inputs, for several threads."""
    with quiet_torch():
        loaded = torch._inductor.aoti_load_package(str(path))
    # The object's own call reads its description of nested inputs as JSON each time; the inputs are flat already.
    run_flat = loaded.loader.boxed_run
    # The call holds Python's global lock, lets go of it for a moment when it frees an input, and takes one caller at a
    # time: a second thread would wait inside for the first with that lock in hand, and both for ever.
    busy = threading.Lock()

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        # The code reads memory in the order it was compiled for and does not look at strides.
        inputs = [v.detach().contiguous() for v in leaves if isinstance(v, torch.Tensor)]
        with busy:
            outputs = run_flat(inputs)
        return [v for v in outputs if isinstance(v, torch.Tensor)]

    return run


def _contiguous(program: Program) -> Program:
    """The program captured with contiguous example inputs, because their strides become part of the code."""
    tensors = [v for v in pytree.tree_leaves(program.example_inputs) if isinstance(v, torch.Tensor)]
    if all(v.is_contiguous() for v in tensors):
        return program
    straight = pytree.tree_map(lambda v: v.contiguous() if isinstance(v, torch.Tensor) else v, program.example_inputs)
    return rewrite(replace(program, example_inputs=straight), lambda module: None)


def retarget(program: Program) -> Program:
    """Shift quantised activations from int8 to uint8 (zero point + 128), which is exact; 4-bit weights become float.

    Inductor's patterns for oneDNN's integer kernels expect unsigned activations and signed weights.
    """

    def change(module: GraphModule) -> int:
        count = float_groups(module)
        nodes: list[Any] = list(module.graph.nodes)
        for node in nodes:
            if node.target in (_q.quantize_per_tensor.default, _q.dequantize_per_tensor.default):
                value, scale, zero, low, high, dtype, *rest = node.args
                if dtype is torch.int8:
                    node.args = (value, scale, zero + 128, low + 128, high + 128, torch.uint8, *rest)
                    count += 1
            elif node.target is _q.dequantize_per_token.default:
                with module.graph.inserting_after(node):
                    rounded = module.graph.call_function(_rounded_rows, (node.args[0].args[0],))
                node.replace_all_uses_with(rounded)
                count += 1
        return count

    return rewrite(program, change)


def _rounded_rows(value: torch.Tensor) -> torch.Tensor:
    """What quantising each row with its own range, and back, gives, in float32.

    torch's operators for that compute in float64, and Inductor of torch 2.11 leaves the result so.
    """
    low = value.amin(-1, keepdim=True).clamp_max(0.0)
    high = value.amax(-1, keepdim=True).clamp_min(0.0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps)
    from_low, from_high = low / scale, high / scale
    zero = torch.where(from_low + from_high > 1, -128 - from_low, 127 - from_high).clamp(-128, 127).round()
    return ((value / scale + zero).round().clamp(-128, 127) - zero) * scale
