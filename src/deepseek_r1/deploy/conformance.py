"""What every deployment target must keep to, as one call: `check_target("mine").ok`.

Knows targets by the registry only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..core import CheckFailedError, Report
from ..core.atomic import sha256_file
from ..graph import Program, capture
from .base import TARGETS, Job, Target


def check_target(name: str) -> Report:
    """Write two small models for a target and check what is left on the disk when it goes well and when it does not.

    Checked: files are written and the report has a passed check; writing again replaces them; a program that answers
    otherwise than its files is refused with CheckFailedError, leaving nothing, or what stood there before.

    Raises:
        PluginError: no such target.

    Example:
        >>> check_target("onnx").ok
        True
    """
    target: Target = TARGETS.get(name)()
    report = Report(f"conformance of the target {name!r}")
    report.check("name", getattr(target, "name", None) == name, f"{getattr(target, 'name', None)!r}")
    for title, make in _MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            program = make()
        with tempfile.TemporaryDirectory(prefix="deepseek-r1-") as folder:
            for what, check in _CHECKS.items():
                try:
                    passed, detail = check(target, program, Path(folder))
                except Exception as e:  # whatever a third party's target raises is the finding
                    passed, detail = False, f"{type(e).__name__}: {str(e)[:300]}"
                report.check(f"{title}: {what}", passed, detail)
    return report


class _Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(image))
        result: torch.Tensor = self.head((x + self.second(x)).mean((2, 3)))
        return result


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.words(ids).mean(1) + shift
        return self.out(x), x


_MODELS: dict[str, Callable[[], Program]] = {
    "cnn": lambda: capture(_Cnn(), torch.randn(2, 1, 6, 6), name="cnn"),
    "words": lambda: capture(_Words(), (torch.randint(0, 20, (2, 5)), torch.randn(2, 8)), name="words"),
}


class _Liar(Program):
    """A program whose own answers are not those of its graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(lambda v: v * 1.5 + 1, super().__call__(*args, **kwargs))


def _job(program: Program, path: Path) -> Job:
    leaves = pytree.tree_leaves(program.example_inputs)
    return Job(
        program=program,
        precision=program.precision,
        path=path,
        name=program.name,
        batches=[(leaves, None)],
        labels=None,
        preprocessing=(),
        extra={},
    )


def _state(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def _writes(target: Target, program: Program, folder: Path) -> tuple[bool, str]:
    report = Report("conformance")
    target.write(_job(program, folder / "model"), report)
    made = bool(_state(folder)) and (folder / "model").exists()
    return made and bool(report.checks) and report.ok, f"{len(report.checks)} checks; files {list(_state(folder))}"


def _writes_again(target: Target, program: Program, folder: Path) -> tuple[bool, str]:
    before = set(_state(folder))
    target.write(_job(program, folder / "model"), Report("conformance"))
    return set(_state(folder)) == before, "the same files, none left over"


def _refuses(target: Target, program: Program, folder: Path, where: str = "model") -> tuple[bool, str]:
    liar = _Liar(exported=program.exported, example_inputs=program.example_inputs, name=program.name)
    before = _state(folder)
    try:
        target.write(_job(liar, folder / where), Report("conformance"))
    except CheckFailedError:
        return _state(folder) == before and set(folder.iterdir()) == {folder / "model"}, "what stood there is unchanged"
    return False, "files that answer otherwise than the program were accepted"


def _leaves_nothing(target: Target, program: Program, folder: Path) -> tuple[bool, str]:
    return _refuses(target, program, folder, "other")


_CHECKS: dict[str, Callable[[Target, Program, Path], tuple[bool, str]]] = {
    "writes": _writes,
    "writes again": _writes_again,
    "keeps the previous files if wrong": _refuses,
    "leaves nothing if wrong": _leaves_nothing,
}
