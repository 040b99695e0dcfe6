"""The benchmarks of training that a GPU lacks, the most important first, until the time is used.

    python benchmarks/training all --list
    python benchmarks/training all --budget-seconds 420 [--since 2026-11-24] [--rounds 2] [--only NAME,NAME]
    python benchmarks/training all --device cpu --small --folder DIR

A cell is a case of `step` (adapters among them), a model of `memory`, or `loss`. Each runs in a process of its own,
which stores what it has as it goes, and is ended where the budget is: the next call goes on with what is missing. What
is there from before `--since` counts as missing. A cell is begun only if there is time for one part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import loss, memory
from .cases import LORA, cases
from .step import RESULT, current, lacking

#: Cases before the memory sweeps; the others come last.
FIRST = ("gpt2-16x1024", "bert-32x128", "llama-4x4096", "bert-128x512", LORA, "resnet-152")
#: Seconds to import everything and run one contestant of a case once.
SECONDS = {"llama-4x4096": 60, LORA: 60, "resnet-152": 120, "bert-128x512": 60}
_USUAL = 45
SHARES = "1,0.8,0.6,0.5,0.4,0.35"


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        name: of the cell.
        arguments: of `python benchmarks/training`.
        file: where it is stored.
        missing: what parts of it are not in that file's content.
        seconds: about how long one part takes.
    """

    name: str
    arguments: list[str]
    file: Path
    missing: Callable[[dict[str, Any]], list[str]]
    seconds: float

    def lacks(self) -> list[str]:
        """The parts that are missing now."""
        return self.missing(json.loads(self.file.read_text()) if self.file.is_file() else {})


def cells(options: argparse.Namespace) -> list[Cell]:
    """All cells, in the order of their importance."""
    every = cases(options.small)
    found: list[Cell] = []
    for name in [*FIRST, "memory", "loss", *(name for name in every if name not in FIRST)]:
        if name == "memory":
            found += _sweeps(options)
        elif name == "loss":
            found.append(_loss(options))
        else:
            found.append(_case(name, list(every[name].contestants), options))
    wanted = options.only.split(",") if options.only else [cell.name for cell in found]
    return [cell for cell in found if cell.name in wanted]


def _shared(file: Path, options: argparse.Namespace) -> tuple[Path, list[str]]:
    """The file of a cell, and what all verbs are given."""
    file = options.folder / file.name if options.folder else file
    return file, ["--out", str(file), "--device", options.device, "--since", options.since]


def _case(name: str, contestants: list[str], options: argparse.Namespace) -> Cell:
    file, more = _shared(RESULT, options)
    more += ["--rounds", str(options.rounds), *(["--small"] if options.small else [])]

    def missing(found: dict[str, Any]) -> list[str]:
        row = found.get("rows", {}).get(name, {})
        return [contestant for contestant in contestants if lacking(row, contestant, options.rounds, options.since)]

    return Cell(name, ["step", "--only", name, *more], file, missing, SECONDS.get(name, _USUAL))


def _sweeps(options: argparse.Namespace) -> list[Cell]:
    device = torch.device(options.device)
    file, more = _shared(memory.result(device), options)
    more += ["--rounds", "1", "--shares", "1,0.5"] if options.small else ["--rounds", "2", "--shares", SHARES]

    def missing(name: str) -> Callable[[dict[str, Any]], list[str]]:
        return lambda found: [] if current(found.get("results", {}).get(name, {}), options.since) else [name]

    names = memory.cases(device)
    return [Cell(f"memory-{name}", ["memory", "--only", name, *more], file, missing(name), 120) for name in names]


def _loss(options: argparse.Namespace) -> Cell:
    file, more = _shared(loss.RESULT, options)
    seeds = "0,1" if options.small else "0,1,2"
    more += ["--small", "--steps", "6"] if options.small else []

    def missing(found: dict[str, Any]) -> list[str]:
        wanted = [f"{who} {seed}" for seed in seeds.split(",") for who in ("fp32", "ours")]
        return [name for name in wanted if not current(found.get("runs", {}).get(name, {}), options.since)]

    return Cell("loss", ["loss", "--seeds", seeds, *more], file, missing, 35)


def run(cell: Cell, left: float) -> str:
    """Run a cell for at most this many seconds; how it ended."""
    began = time.monotonic()
    # In a session of its own: what it started, such as the workers of loaders, is ended with it.
    process = subprocess.Popen([sys.executable, str(Path(__file__).parent), *cell.arguments], start_new_session=True)
    try:
        code = process.wait(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended after {left:.0f} s, with what it has stored"
    return f"{'done' if code == 0 else f'exit code {code}'} in {time.monotonic() - began:.0f} s"


def listed(found: list[Cell]) -> str:
    """What is there and what is missing."""
    lines = []
    for cell in found:
        lacks = cell.lacks()
        lines.append(f"{cell.name:18} {'missing: ' + ', '.join(lacks) if lacks else 'there'}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The `all` verb."""
    parser = argparse.ArgumentParser(prog="all", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what is there and what is missing, run nothing")
    parser.add_argument("--budget-seconds", type=float, default=420.0)
    parser.add_argument("--only", default="", help="names of cells")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--since", default="", help="a date: what is older counts as missing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--folder", type=Path, help="where results are, instead of benchmarks/results")
    options = parser.parse_args(arguments)
    if options.small and options.folder is None:
        parser.error("--small needs --folder, as the results of tiny shapes are no results")
    end = time.monotonic() + options.budget_seconds
    found = cells(options)
    if not options.list:
        for cell in found:
            left = end - time.monotonic()
            if not cell.lacks():
                continue
            if left < cell.seconds:
                print(f"{cell.name}: not begun, {left:.0f} s are left", flush=True)
                continue
            print(f"{cell.name}: {run(cell, left)}", flush=True)
    print(listed(found), flush=True)
    return 0
