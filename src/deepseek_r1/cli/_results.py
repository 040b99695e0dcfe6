"""Programs that a verb made, in the form that `--out` asks for."""

from __future__ import annotations

from pathlib import Path

from ..core import Report
from ..deploy import export
from ..graph import Program
from ._inputs import Opened


def write_program(program: Program, out: Path, opened: Opened, data: str) -> Report:
    """Write a .dr1 file, or export to ONNX or an artifact; the program's report, with what was written.

    Args:
        data: as it was given, for the next command.
    """
    report = program.report
    if out.suffix == ".dr1":
        program.save(out)
        report.note(f"wrote {out}; next: deepseek-r1 optimize {out} --data {data} --out DIR")
        return report
    report.sections.append(export(program, out, **opened.for_artifact()))
    report.note(f"wrote {out}")
    return report
