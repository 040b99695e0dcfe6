"""`deepseek-r1 build-op`: a C++ source of operators to a library that `ops.register_custom_op` takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..core import Report
from ._frame import Html, Json, verb


@verb(endings=(".so",))
def build_op(
    source: Annotated[Path, typer.Argument(help="A C++ file that includes <deepseek_r1/core/operator.h>, or a .cu.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The library; by default the source's name with .so.")
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="Compile with nvcc, for CPU and GPU.")] = False,
    target: Annotated[
        str | None, typer.Option(metavar="MACHINE", help="x86_64 or aarch64, where that is not this machine.")
    ] = None,
    march: Annotated[
        str | None, typer.Option(help="Instruction sets, like x86-64-v3, armv8.2-a; with --cuda like sm_90.")
    ] = None,
    compiler: Annotated[str | None, typer.Option(metavar="COMMAND", help="Another compiler than the usual.")] = None,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Build a library of operators from a C++ source.

    Without --march the library is for this machine's processor: it may not run on another.
    """
    from ..ops import build_op as run
    from ..ops import describe

    begin = time.perf_counter()
    library = run(source, out, cuda=cuda, target=target, march=march, compiler=compiler)
    report = Report(f"build-op {source.name}")
    report.add("time", time.perf_counter() - begin, unit="s", how="compiler and linker")
    report.add("library", library.stat().st_size / 1e3, unit="kB", how=str(library))
    if (about := describe(library)) is None:
        report.note(f"built for {target}; it was not loaded here")
        return report
    for op in about:
        takes = f"{op.inputs} in, {op.outputs} out, {', '.join(op.dtypes)}, on {' and '.join(op.devices)}"
        report.add(f"operator {op.name}", takes, how="its own backward" if op.backward else "derivative by expression")
    names = ", ".join(repr(op.name) for op in about)
    report.note(f'next: deepseek_r1.ops.register_custom_op(name, "{library}") with name {names}')
    return report
