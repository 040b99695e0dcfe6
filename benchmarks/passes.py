"""What each pass of `simplify` gains, on every architecture of the zoo and every engine.

    python benchmarks/passes.py [--models bert_base,unet] [--engines eager,onnxruntime] [--rounds 40] [--seconds 20]

For each architecture all passes are run once, and the plain program and the simplified one are compiled by each engine
and timed in turns. Where all passes together change 3 % or may do so, either way, the program without each pass that
changed something is compiled and timed as well. (Where they do not, one pass could still gain what another loses; that
is not looked for.) The program with all passes runs under a second name: how far it is from itself is what the method
can tell. A pass that gains less than 3 % everywhere is named at the end; it should be deleted. `--without a+b,c` times
the program without a and b and the one without c instead of one without each pass, and always. `--device cuda` puts
module and inputs there in float16, and writes passes_cuda.json.

One model at a time is held in memory. Writes benchmarks/results/passes.json after each model, so that a run that was
broken off is not lost; `--resume` leaves out the engines of a model that the file has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from optimize_zoo import about
from zoo import ENTRIES, Entry

from deepseek_r1.core import atomic
from deepseek_r1.engines import ENGINES, compile_program
from deepseek_r1.graph import PASSES, Program, as_inputs, capture, simplify
from deepseek_r1.measure import paired_latency, ratio_interval

_FOLDER = Path(__file__).parent / "results"
RESULTS = {"cpu": _FOLDER / "passes.json", "cuda": _FOLDER / "passes_cuda.json"}
#: What a pass must gain on one architecture and engine at least, to stay.
WORTH = 1.03


def programs(program: Program, groups: list[str]) -> tuple[dict[str, Program], list[dict[str, Any]]]:
    """The plain program, the simplified one, one without each group of passes; and what each pass changed."""
    full = simplify(program, strict=False)
    prefix = "pass "
    rows = [r for r in full.report.rows if r.unit == "nodes" and r.metric.startswith(prefix)]
    made = {"plain": program, "all": full}
    changes = [
        {"pass": r.metric.removeprefix(prefix), "nodes_before": r.before, "nodes_after": r.after, "how": r.how}
        for r in rows
    ]
    effective = {change["pass"] for change in changes}
    for group in groups or sorted(effective):
        if left_out := effective & set(group.split("+")):
            made[f"without {group}"] = simplify(program, [p for p in PASSES if p not in left_out], strict=False)
    return made, changes


def call_of(engine: str, program: Program, leaves: list[Any]) -> Callable[[], object]:
    """One run of a program on an engine; raises whatever the engine raises while it compiles."""
    plugin = ENGINES.get(engine)()
    if reason := plugin.unavailable() or plugin.unsupported(program):
        raise RuntimeError(reason)
    run = compile_program(plugin, program)

    def call() -> object:
        with torch.inference_mode():
            outputs = run(leaves)
        if any(v.is_cuda for v in leaves if isinstance(v, torch.Tensor)):
            torch.cuda.synchronize()
        return outputs

    return call


def on_cuda(module: torch.nn.Module, inputs: Any) -> tuple[torch.nn.Module, Any]:
    """Module and inputs on the GPU; what is a float becomes float16."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.cuda().half() if value.is_floating_point() else value.cuda()

    return module.half().cuda(), pytree.tree_map(move, inputs)


def measure(
    engine: str, made: dict[str, Program], leaves: list[Any], rounds: int, seconds: float, always: bool
) -> dict[str, Any]:
    """Gain of each pass on one engine: time without it over time with all passes."""
    calls: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}

    def build(names: Iterable[str]) -> None:
        for name in names:
            try:
                calls[name] = call_of(engine, made[name], leaves)
            except Exception as e:  # an engine may refuse in any way; that is a result
                failed[name] = f"{type(e).__name__}: {str(e)[:200]}"

    build(made if always else ["plain", "all"])
    if "all" not in calls:
        return {"failed": failed}
    calls["all again"] = calls["all"]
    found = timed(calls, rounds, seconds)
    gain = found["gains"].get("plain")
    if not always and (gain is None or gain["high"] >= WORTH or gain["low"] <= 1 / WORTH):
        build([name for name in made if name.startswith("without ")])
        found = timed(calls, rounds, seconds)
    return {**found, "failed": failed}


def timed(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, Any]:
    """Median times, and how much slower than with all passes each call is."""
    times = paired_latency(calls, rounds=rounds, max_seconds=seconds)
    gains = {}
    for name in times:
        if name != "all":
            low, middle, high = ratio_interval(times[name], times["all"])
            gains[name] = {"gain": middle, "low": low, "high": high}
    return {"ms": {name: t.median_ms for name, t in times.items()}, "gains": gains}


def one_model(
    entry: Entry, engines: list[str], groups: list[str], rounds: int, seconds: float, small: bool, device: str
) -> dict[str, Any]:
    """All measurements of one architecture."""
    module, inputs = entry.make(small=small)
    if device == "cuda":
        module, inputs = on_cuda(module, inputs)
    made, changes = programs(capture(module, inputs), groups)
    args, kwargs = as_inputs(inputs)
    leaves = pytree.tree_leaves((args, kwargs))
    measured = {engine: measure(engine, made, leaves, rounds, seconds, bool(groups)) for engine in engines}
    return {"shapes": entry.shapes, "changes": changes, "engines": measured}


def best_gains(models: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each pass, where it gains most; only what the interval and the spread of the run itself bear out counts."""
    # A pass that is gone since keeps what was measured.
    names = [*PASSES, *sorted({c["pass"] for result in models.values() for c in result["changes"]} - {*PASSES})]
    best: dict[str, dict[str, Any]] = {name: {"gain": 1.0, "where": ""} for name in names}
    for model, result in models.items():
        for engine, measured in result["engines"].items():
            gains = measured.get("gains", {})
            noise = gains.get("all again", {"high": 1.0})["high"]
            for name in names:
                found = gains.get(f"without {name}")
                if found and found["low"] > max(1.0, noise) and found["gain"] > best[name]["gain"]:
                    best[name] = {"gain": found["gain"], "where": f"{model} on {engine}"}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="names of the zoo, by commas; all by default")
    parser.add_argument("--engines", default="", help="names of engines, by commas; all but null by default")
    parser.add_argument("--without", default="", help="passes left out: a+b,c leaves out two together, then one")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20.0, help="at most this long for one comparison")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--small", action="store_true", help="the zoo's small variants, to try the script")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.small and args.out is None:
        parser.error("--small needs --out: small variants are no results")
    args.out = args.out or RESULTS[args.device]
    torch.set_num_threads(args.threads)
    wanted = args.models.split(",") if args.models else [entry.name for entry in ENTRIES]
    engines = args.engines.split(",") if args.engines else [name for name in ENGINES.names() if name != "null"]
    document: dict[str, Any] = about(args.device) | {
        "what": "time without a pass / time with all passes, paired rounds; above 1 the pass gains",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "models": json.loads(args.out.read_text())["models"] if args.resume and args.out.is_file() else {},
    }
    for entry in ENTRIES:
        known = document["models"].get(entry.name, {"engines": {}})["engines"]
        left = [engine for engine in engines if engine not in known]
        if entry.name not in wanted or not left:
            continue
        groups = args.without.split(",") if args.without else []
        found = one_model(entry, left, groups, args.rounds, args.seconds, args.small, args.device)
        document["models"][entry.name] = {**found, "engines": {**known, **found["engines"]}}
        document["best"] = best_gains(document["models"])
        atomic.write_json(args.out, document)
        for engine, measured in found["engines"].items():
            told = {name: f"{gain['gain']:.3f}" for name, gain in measured.get("gains", {}).items()}
            print(entry.name, engine, told or measured["failed"], flush=True)
    for name, found in best_gains(document["models"]).items():
        verdict = "stays" if found["gain"] >= WORTH else "gains less than 3 % everywhere"
        print(f"{name}: {verdict}; best {found['gain']:.3f} {found['where']}")


if __name__ == "__main__":
    main()
