"""Which format for which layer: uniform ones, ModelOpt's effective bits, and ours, all measured alike.

    python benchmarks/quantization search [--only digits] [--modelopt-python /path/python] [--build] [--time]

A *point* is a network with a format for each layer, quantised by `quantize_program` and compiled for ONNX Runtime. Each
gets its loss on held-out samples, its task metric, the size of its file (`--build`), and its latency on one sample,
measured in turns with all the others of its network and with float32 twice (`--time`). Points are kept in the cache
folder; the JSON in benchmarks/results grows point by point. Effective bits are skipped if no Python with ModelOpt is
given, and the table says so.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about
from scipy.stats import spearmanr

from deepseek_r1.core import (
    Budget,
    DeepSeekError,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
    LayerFormat,
    atomic,
)
from deepseek_r1.engines import ENGINES
from deepseek_r1.graph import Program, capture, simplify
from deepseek_r1.measure import paired_latency, ratio_interval
from deepseek_r1.quantization import AutoConfig, AutoQuantizer, PTQConfig, quantize_program

from . import nets
from .cache import folder
from .intervals import mean_difference
from .peers import fresh

RESULT = Path(__file__).parents[1] / "results" / "quantization_search.json"
ENGINE = "onnxruntime"
#: The candidates of every searcher.
FORMATS: tuple[LayerFormat, ...] = (Int8Static(), Int8Dynamic(), Int8Weight(), Int4Weight(group_size=64))
#: Targets of effective bits, of 16; those that cannot be met are left out.
BITS = (4.5, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0)
#: Points of our curve that are built.
OURS = 6
#: Label of what is returned for the latency of a uniform format, and how much longer it may take: that is noise.
RETURNED, ROOM = "returned for ", 0.1
#: Points whose latency differs by less are equally fast.
EQUAL = 0.01

Point = Mapping[str, Any]


def captured(net: nets.Net) -> Program:
    """The float program, captured from two samples so that the batch stays free."""
    inputs = net.held_out[0][0]
    return capture(net.build(), {k: v[:2] for k, v in inputs.items()} if isinstance(inputs, dict) else (inputs[:2],))


def assigned(net: nets.Net, fmt: LayerFormat, layers: Mapping[str, LayerFormat] | None = None) -> Program:
    """The network with a format for each layer; layers that cannot have theirs stay float, and its report says so."""
    return quantize_program(captured(net), net.calibration, PTQConfig(format=fmt, layers=layers or {}))


def place(name: str, label: str) -> Path:
    """Where a point's files are kept."""
    return folder("search", name, label)


def keep_point(name: str, label: str, make: Callable[[], Program]) -> dict[str, Any]:
    """Compile a program for the engine, judge it, and keep its files for the timing."""
    net, where = nets.net(name), fresh(place(name, label))
    engine, start = ENGINES.get(ENGINE)(), time.perf_counter()
    (where / "files").mkdir()
    try:
        program = make()
        made_s = time.perf_counter() - start
        engine.build(program, where / "files", program.precision)
        program.save(where / "program.dr1", with_parent=False)
        found = nets.judge(name, nets.answers(opened(name, label), net.held_out))
    except DeepSeekError as e:  # what cannot be quantised or run so is a result
        return {"failed": str(e)[:200]}
    counts = {r.metric: r.after for r in program.report.rows if r.metric.startswith("layers in")}
    size = sum(p.stat().st_size for p in (where / "files").rglob("*") if p.is_file())
    kept = {k: v for k, v in found.items() if k not in ("losses", "divergences")}
    for each in ("losses", "divergences"):
        atomic.write_json(where / f"{each}.json", found[each])
    return kept | {"file_bytes": size, "made_s": made_s, "layers": counts}


def opened(name: str, label: str) -> nets.Answer:
    """What answers, from a point's files."""
    where = place(name, label)
    load = functools.cache(lambda: Program.load(where / "program.dr1"))
    run = ENGINES.get(ENGINE)().open(where / "files", load)
    return lambda parts: run(parts)[0]


def effective_bits(name: str, python: str, formats: Sequence[LayerFormat] = FORMATS) -> dict[str, Any]:
    """ModelOpt's assignments by target, from a process of its own; or with what it failed."""
    out = folder("search", name) / "effective_bits.json"
    if not out.is_file():
        known = json.dumps([f.to_dict() for f in formats if f.is_quantised])
        command = [python, str(Path(__file__).parent), "effective-bits", "--net", name, "--formats", known]
        command += ["--bits", ",".join(map(str, BITS)), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [""])[-1][:300]}
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def points_of(name: str, python: str | None, row: dict[str, Any]) -> Iterable[tuple[str, Callable[[], Program]]]:
    """Every point of a network by its label, with what makes it."""
    net = nets.net(name)
    yield "float32", lambda: simplify(captured(net))
    for fmt in FORMATS:
        yield f"uniform {fmt}", functools.partial(assigned, net, fmt)
    yield from our_points(net, row)
    if python is None:
        row["effective_bits"] = {"failed": "no Python with ModelOpt was given"}
        return
    row["effective_bits"] = found = effective_bits(name, python)
    seen: list[Any] = []
    # ModelOpt assigns formats to layers whose answers nobody reads, too.
    graph = simplify(captured(net)).exported
    read = {n.name for n in graph.graph.nodes if n.op == "placeholder" and n.users}
    called = {name for n, name in graph.graph_signature.inputs_to_parameters.items() if n in read}
    for bits, assignment in found.get("assignments", {}).items():
        layers = {n: f for n, f in assignment.items() if f"{n}.weight" in called}
        if layers in seen:
            continue
        seen.append(layers)
        formats = {n: LayerFormat.from_dict(f) for n, f in layers.items()}
        yield f"effective-bits {bits}", functools.partial(assigned, net, Int8Weight(), formats)


def our_points(net: nets.Net, row: dict[str, Any]) -> Iterable[tuple[str, Callable[[], Program]]]:
    """Points of AutoQuantizer's curve between loss and latency, with what it predicts of each."""
    one = net.one if isinstance(net.one, dict) else nets.leaves(net.one)
    config = AutoConfig(
        engine=ENGINE, formats=FORMATS, points=OURS, calibration_batches=len(net.calibration), task=net.task
    )
    start, begin = time.perf_counter(), time.process_time()
    # It verifies on the data that calibrate too: what is held out is for the judge here alone.
    quantizer = AutoQuantizer(captured(net), dataset=[*net.calibration, *net.calibration], example_inputs=one,
                              config=config)  # fmt: skip
    curve = quantizer.pareto()
    plain = quantizer.uniform()[0].costs["ms"]
    numbers = sum(p.numel() for p in net.build().parameters())
    row["search"] = {
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - begin, "parameters": numbers,
        "predicted": {
            f"ours {i}": {"loss": c.costs["loss"], "latency": c.costs["ms"] / plain} for i, c in enumerate(curve)
        },
    }  # fmt: skip
    for i, candidate in enumerate(curve):
        yield f"ours {i}", functools.partial(quantizer.build, candidate)
    for rival in quantizer.uniform()[1:]:
        # What a user gets who asks for a uniform format's latency.
        budget = Budget(latency_ms=rival.costs["ms"] * (1 + ROOM))
        yield RETURNED + rival.title.removeprefix("all in "), functools.partial(quantizer.quantize, budget=budget)


def returned(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What `quantize(budget=...)` gave for the latency of each uniform format, against that format on held-out data."""
    found = {}
    for label, point in row["points"].items():
        rival = "uniform " + label.removeprefix(RETURNED)
        if label.startswith(RETURNED) and "loss" in point and "loss" in row["points"].get(rival, {}):
            stored = (json.loads((place(name, n) / "divergences.json").read_text()) for n in (label, rival))
            # A text has one for each position.
            one, other = (torch.tensor(values).reshape(len(values), -1).mean(1).tolist() for values in stored)
            low, middle, high = mean_difference(one, other, nets.net(name).clusters)
            latency, other_latency = (p.get("latency", 0.0) for p in (point, row["points"][rival]))
            found[label] = {
                "divergence": point["divergence"], "of_the_uniform": row["points"][rival]["divergence"],
                "difference": [low, middle, high], "latency": latency, "latency_of_the_uniform": other_latency,
                # What is faster may diverge more.
                "surely_worse": low > 0 and latency >= other_latency * (1 - EQUAL), "surely_better": high < 0,
            }  # fmt: skip
    return found


def timed(name: str, labels: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Latency of points on one sample, in turns with each other and with float32 again."""
    parts = nets.leaves(nets.net(name).one)
    calls = {label: functools.partial(opened(name, label), parts) for label in labels}
    calls["float32 again"] = functools.partial(opened(name, "float32"), parts)
    times = paired_latency(calls, rounds=rounds, max_seconds=seconds)
    return {
        "noise": ratio_interval(times["float32"], times["float32 again"]), "load": os.getloadavg()[0],
        "rounds": len(times["float32"].seconds), "threads": torch.get_num_threads(),
        "ms": {n: latency.median_ms for n, latency in times.items()},
        # In units of float32's latency of the same round, so that what disturbs one disturbs both.
        "relative": {n: ratio_interval(times[n], times["float32"])[1] for n in labels},
    }  # fmt: skip


def against(ours: Sequence[Point], other: Point, loss: str = "loss") -> dict[str, Any]:
    """What the best of ours has over another point: at its latency the least loss, at its loss the least latency.

    A point has `loss` and "latency"; latencies that differ by less than `EQUAL` are equal.
    """
    as_fast = [p[loss] for p in ours if p["latency"] <= other["latency"] * (1 + EQUAL)]
    as_good = [p["latency"] for p in ours if p[loss] <= other[loss]]
    return {
        "loss_at_equal_latency": min(as_fast, default=None), "latency_at_equal_loss": min(as_good, default=None),
        "lower_loss": bool(as_fast) and min(as_fast) < other[loss],
        "lower_latency": bool(as_good) and min(as_good) < other["latency"] * (1 - EQUAL),
    }  # fmt: skip


def verdict(row: Mapping[str, Any]) -> dict[str, Any]:
    """What our points have over each other one, by divergence from float32, and how well they were predicted."""
    points = {n: p for n, p in row["points"].items() if "latency" in p}
    ours = {n: p for n, p in points.items() if n.startswith("ours")}
    if not ours:
        return {}
    others = {n: p for n, p in points.items() if n not in ours and not n.startswith(RETURNED)}
    found: dict[str, Any] = {
        name: {n: against([*ours.values()], p, loss) for n, p in others.items()}
        for name, loss in (("against", "divergence"), ("against_by_loss", "loss"))
    }
    predicted = row.get("search", {}).get("predicted", {})
    known = [n for n in ours if n in predicted]
    for measure, real in (("latency", "latency"), ("loss", "divergence")):
        pairs = [(predicted[n][measure], ours[n][real]) for n in known if ours[n][real]]
        if len(pairs) > 2:
            found[measure] = prediction_quality(*zip(*pairs, strict=True))
    return found


def prediction_quality(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Mean absolute error relative to what was measured, and Spearman's rank correlation."""
    pairs = list(zip(predicted, measured, strict=True))
    error = sum(abs(p - m) / abs(m) for p, m in pairs) / len(pairs)
    return {"mape": error, "spearman": float(spearmanr(predicted, measured).statistic), "points": len(pairs)}


def frontier(points: Mapping[str, Point], loss: str = "loss") -> list[str]:
    """Labels of the points that no other beats in both loss and latency, fastest first."""
    ordered = sorted(points, key=lambda n: (points[n]["latency"], points[n][loss]))
    kept: list[str] = []
    for label in ordered:
        if not kept or points[label][loss] < points[kept[-1]][loss]:
            kept.append(label)
    return kept


def _build(name: str, row: dict[str, Any], options: argparse.Namespace, save: Callable[[], None]) -> None:
    known = row.setdefault("points", {})
    for label, make in points_of(name, options.modelopt_python, row):
        if label not in known or (options.fresh and label not in row.setdefault("again", [])):
            known[label] = keep_point(name, label, make)
            told = {
                k: v for k, v in known[label].items() if k in ("metric", "loss", "divergence", "file_bytes", "failed")
            }
            print(name, label, told, dict(Counter(known[label].get("layers", {}))), flush=True)
            save()
    row.pop("again", None)


def _time(name: str, row: dict[str, Any], options: argparse.Namespace) -> None:
    labels = [n for n, p in row.get("points", {}).items() if "loss" in p]
    command = [sys.executable, str(Path(__file__).parent), "search", "--one", name, "--labels", json.dumps(labels)]
    command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row["latency"] = json.loads(done.stdout.rpartition("@@row ")[2])
    for label, relative in row["latency"]["relative"].items():
        row["points"][label]["latency"] = relative
    row["verdict"] = verdict(row)
    row["returned"] = returned(name, row)
    row["frontier"] = frontier({n: p for n, p in row["points"].items() if "latency" in p}, "divergence")
    print(name, row["latency"]["noise"], row["frontier"], flush=True)


def main(arguments: list[str]) -> int:
    """The `search` verb."""
    parser = argparse.ArgumentParser(prog="search", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="networks, separated by commas")
    parser.add_argument("--modelopt-python", help="a Python with nvidia-modelopt")
    parser.add_argument("--build", action="store_true", help="quantise and judge only")
    parser.add_argument("--time", action="store_true", help="time what is there only")
    parser.add_argument("--fresh", action="store_true", help="make again what is there")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print("\n@@row " + json.dumps(timed(options.one, options.labels, options.rounds, options.seconds)))
        return 0
    rows = {r["name"]: r for r in json.loads(options.out.read_text())["rows"]} if options.out.is_file() else {}
    for name in options.only.split(",") if options.only else nets.NETS:
        row = rows.setdefault(name, {"name": name, "metric": nets.net(name).metric, "engine": ENGINE})

        def save() -> None:
            atomic.write_json(options.out, about("cpu") | {"rows": list(rows.values())})

        if options.build or not options.time:
            _build(name, row, options, save)
        if options.time or not options.build:
            _time(name, row, options)
        save()
    return 0
