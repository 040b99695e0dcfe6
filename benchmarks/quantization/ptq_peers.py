"""`quantize` with its defaults against NNCF, ONNX Runtime and torchao: the task metric, and latency of one sample.

    python benchmarks/quantization ptq [--only minilm,digits] [--peer-python NNCF=/path/python] [--build] [--time]

Everybody calibrates on the same samples and is judged on others (see `nets`). Ours is what a user gets: `quantize`,
then `optimize` with the same data, which may keep the float form if int8 loses too much. Building and judging happen in
a process for each (`--build`); then all are timed in turns in one (`--time`), eager twice: how far it is from itself is
what the clock can tell. What is built is kept in the cache folder; the JSON in benchmarks/results grows net by net.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about

from deepseek_r1.core import atomic
from deepseek_r1.measure import paired_latency, ratio_interval

from . import nets
from .cache import folder
from .intervals import mean_difference
from .peers import OURS, RIVALS, check_open, fresh, ours

RESULT = Path(__file__).parents[1] / "results" / "ptq_peers.json"
#: Our speed over a peer's may be this much below 1.
BAR = 0.97
#: A rival must be built and judged within this many seconds.
_LIMIT_S = 1200


def place(name: str, rival: str) -> Path:
    """Where a rival's files for a network are kept."""
    return folder("ptq", name, rival.replace(" ", "_"))


def build(name: str, rival: str, engines: list[str] | None = None) -> dict[str, Any]:
    """Build one rival and judge it on the held-out samples."""
    net, who, where = nets.net(name), RIVALS[rival], fresh(place(name, rival))
    start = time.perf_counter()
    with torch.no_grad():
        how = ours(net, where, engines) if rival == OURS else who.build(net, where)
    facts: dict[str, Any] = {"how": how, "build_s": time.perf_counter() - start, "versions": who.versions()}
    answer = who.open(net, where)
    check_open(net, answer)
    facts |= nets.judge(name, nets.answers(answer, net.held_out, who.batch_size))
    # Files that a runtime reads, not those on the way there.
    facts["file_bytes"] = sum((where / file).stat().st_size for file in who.files)
    atomic.write_json(where / "losses.json", facts.pop("losses"))
    del facts["divergences"]
    return facts


def build_apart(name: str, rival: str, python: str, engines: str | None) -> dict[str, Any]:
    """`build` in a process of its own; a rival that fails says with what."""
    command = [python, str(Path(__file__).parent), "ptq", "--one", name, "--rival", rival]
    command += ["--engines", engines] if engines else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {_LIMIT_S} s"}
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        return {"failed": (last or [f"exit code {done.returncode}"])[0][:300]}
    found: dict[str, Any] = json.loads(done.stdout.rpartition("@@row ")[2])
    return found


def timed(name: str, rivals: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Latency of the rivals on one sample, in turns, and how much faster ours is."""
    net = nets.net(name)
    parts = nets.leaves(net.one)
    eager = torch.inference_mode()(nets.module_answer(net.build(), net.one))
    calls = {n: functools.partial(RIVALS[n].open(net, place(name, n)), parts) for n in rivals}
    calls |= {"eager": functools.partial(eager, parts), "eager again": functools.partial(eager, parts)}
    with torch.inference_mode():
        times = paired_latency(calls, rounds=rounds, max_seconds=seconds)
    found: dict[str, Any] = {
        "noise": ratio_interval(times["eager"], times["eager again"]), "rounds": len(times["eager"].seconds),
        "load": os.getloadavg()[0], "threads": torch.get_num_threads(),
        "ms": {n: latency.median_ms for n, latency in times.items()},
        "over_eager": {n: ratio_interval(times["eager"], times[n]) for n in rivals},
    }  # fmt: skip
    if OURS in times:
        found["ours_over"] = {n: ratio_interval(times[n], times[OURS]) for n in rivals if n != OURS}
    return found


def verdict(name: str, rivals: dict[str, dict[str, Any]], latency: dict[str, Any]) -> dict[str, Any]:
    """Who is best in what, and whether ours meets both bars."""
    net = nets.net(name)
    done = {n: r for n, r in rivals.items() if "metric" in r}
    peers = [n for n in done if n != OURS]
    if OURS not in done or not peers:
        return {}
    sign = 1 if net.higher_is_better else -1
    best = max(peers, key=lambda n: sign * done[n]["metric"])
    losses = {n: json.loads((place(name, n) / "losses.json").read_text()) for n in done}
    against = {n: mean_difference(losses[OURS], losses[n], net.clusters) for n in peers}
    told: dict[str, Any] = {
        "best_peer": best, "metric_no_worse": sign * done[OURS]["metric"] >= sign * done[best]["metric"],
        "loss_against": against, "loss_no_worse": all(low <= 0 for low, _, _ in against.values()),
    }  # fmt: skip
    if "ours_over" in latency:
        slowest_lead = min(latency["ours_over"], key=lambda n: latency["ours_over"][n][1])
        told |= {
            "fastest_peer": slowest_lead, "speed_over_fastest": latency["ours_over"][slowest_lead],
            "fast_enough": latency["ours_over"][slowest_lead][1] >= BAR,
        }  # fmt: skip
    return told


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in json.loads(path.read_text())["rows"]} if path.is_file() else {}


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    versions = {k: v for row in rows.values() for r in row["rivals"].values() for k, v in r.get("versions", {}).items()}
    head = about("cpu")
    atomic.write_json(path, head | {"versions": head["versions"] | versions, "rows": list(rows.values())})


def _measure(name: str, row: dict[str, Any], options: argparse.Namespace, save: Callable[[], None]) -> None:
    """Do for one network what is asked for and missing, and judge."""
    net, pythons = nets.net(name), dict(given.split("=", 1) for given in options.peer_python)
    row |= {"name": name, "metric": net.metric, "higher_is_better": net.higher_is_better}
    rivals = row.setdefault("rivals", {})
    if not options.time or options.build:
        for rival, who in RIVALS.items():
            if who.only not in ("", net.kind) or (options.rivals and rival not in options.rivals.split(",")):
                continue
            if "metric" in rivals.get(rival, {}) and not options.fresh:
                continue
            rivals[rival] = build_apart(name, rival, pythons.get(rival, sys.executable), options.engines)
            print(name, rival, rivals[rival], file=sys.stderr, flush=True)
            save()
    if not options.build or options.time:
        ready = [n for n in RIVALS if "metric" in rivals.get(n, {})]
        command = [sys.executable, str(Path(__file__).parent), "ptq", "--one", name, "--rival", ",".join(ready)]
        command += ["--time", "--rounds", str(options.rounds), "--seconds", str(options.seconds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row["latency"] = json.loads(done.stdout.rpartition("@@row ")[2])
    row["verdict"] = verdict(name, rivals, row.get("latency", {}))


def main(arguments: list[str]) -> int:
    """The `ptq` verb."""
    parser = argparse.ArgumentParser(prog="ptq", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="networks, separated by commas")
    parser.add_argument("--rivals", help="who is built, separated by commas")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="of a rival's own")
    parser.add_argument("--engines", help="that ours races, separated by commas; by default all")
    parser.add_argument("--build", action="store_true", help="build and judge only")
    parser.add_argument("--time", action="store_true", help="time what is built only")
    parser.add_argument("--fresh", action="store_true", help="build again what is built")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        if options.time:
            found = timed(options.one, options.rival.split(","), options.rounds, options.seconds)
        else:
            found = build(options.one, options.rival, options.engines.split(",") if options.engines else None)
        print("\n@@row " + json.dumps(found))
        return 0
    rows = _read(options.out)

    def save() -> None:
        _write(options.out, rows)

    for name in options.only.split(",") if options.only else nets.NETS:
        _measure(name, rows.setdefault(name, {"name": name, "rivals": {}}), options, save)
        save()
        print(name, {k: v for k, v in rows[name]["verdict"].items() if k != "loss_against"}, flush=True)
    return 0
