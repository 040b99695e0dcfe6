"""Put the tables of docs/benchmarks.md between their markers, from the JSON in benchmarks/results.

    python benchmarks/tables.py [--check]

Each `<!-- table: NAME -->` ... `<!-- end -->` is filled by the function of that name below; a result that was not
measured says so. With `--check` nothing is written, and a page that differs is an error.
"""

# ruff: noqa: RUF001 - tables have dashes and signs of their own
from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from training import page as training_page

from deepseek_r1.core import atomic
from deepseek_r1.graph import PASSES
from quantization import page

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A result file; empty if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def measured_on(found: dict[str, Any]) -> str:
    """One sentence of hardware, versions and date."""
    hardware = found["hardware"]
    gpus = [gpu["name"] for gpu in hardware.get("gpus", []) if found.get("device", "cuda") != "cpu"]
    where = gpus[0] if gpus else f"{hardware['cpu']}, {hardware['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "deepseek-r1")
    return f"Measured on {where}, {hardware['system'].split('-')[0]}, {found['date'][:10]}; {versions}."


def geomean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def high(row: dict[str, Any]) -> float:
    """Upper end of the chosen engine's interval; 1 for eager itself."""
    return float(row["engines"].get(row["chosen"], {}).get("high", 1.0))


def zoo(found: dict[str, Any]) -> str:
    """The CPU zoo."""
    rows = [r for r in found["rows"] if "failed" not in r]
    broken = [r for r in found["rows"] if "failed" in r]
    names = sorted({name for row in rows for name in row["engines"]})
    body = []
    for row in rows:
        cells = [f"{row['engines'][n]['speedup']:.2f}" if n in row["engines"] else "–" for n in names]
        noise = "{:.2f}–{:.2f}".format(row["noise"][0], row["noise"][2])
        chosen = f"**{row['speedup']:.2f}** ({row['low']:.2f}–{high(row):.2f})"
        regret = f"{max(0.0, row['regret']):.1%}"
        body.append(
            [row["name"], row["shapes"], f"{row['eager_ms']:.3g}", noise, row["chosen"], chosen, regret, *cells]
        )
    head = ["model", "inputs", "eager, ms", "eager/eager", "chosen", "× eager (95 %)", "regret", *names]
    text = [table(head, body), "", *(f"{r['name']}: failed: {r['failed']}" for r in broken)]
    return "\n".join([*text, *zoo_summary(rows, names), "", measured_on(found)])


def zoo_summary(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """What the rows say together."""
    own = geomean(row["speedup"] for row in rows)
    # An engine that cannot run a model leaves its user with eager.
    single = {n: geomean(row["engines"].get(n, {"speedup": 1.0})["speedup"] for row in rows) for n in names}
    wins = {n: sum(row["chosen"] == n for row in rows) for n in [*names, "eager fp32"]}
    fastest = {n: sum(row["best"] == n for row in rows) for n in [*names, "eager"]}
    low = [row for row in rows if max(0.0, row["regret"]) <= 0.03]
    slower = [row["name"] for row in rows if high(row) < 1 / max(row["noise"][2], 1 / row["noise"][0])]
    every = ", ".join(f"{n} {value:.2f}" for n, value in sorted(single.items(), key=lambda pair: -pair[1]))
    shares = ", ".join(f"{n} {count}" for n, count in sorted(wins.items(), key=lambda pair: -pair[1]) if count)
    long = ", ".join(f"{n} {count}" for n, count in sorted(fastest.items(), key=lambda pair: -pair[1]) if count)
    return [
        f"- {len(rows)} models; geometric mean of the chosen engine: **{own:.2f} × eager** (bar: 1.8).",
        f"- Geometric mean of each engine alone, eager where it cannot run a model: {every}.",
        f"- Chosen by the race: {shares}. Fastest in the long race: {long}.",
        f"- Regret at most 3 % on {len(low)} of {len(rows)} ({len(low) / len(rows):.0%}; bar: 90 %).",
        f"- Slower than eager beyond the noise: {', '.join(slower) or 'none'}.",
    ]


def gpu_zoo(found: dict[str, Any]) -> str:
    """The GPU models."""
    body = []
    for row in found["rows"]:
        ratio = row["against reduce-overhead"]
        peak = row["peak_mb"]
        body.append([
            row["name"], row["shapes"], f"{row['ms']['eager']:.2f}", f"{row['ms']['optimize']:.3f}",
            f"{row['ms']['reduce-overhead']:.3f}", row["chosen"], f"{row['speedup'][1]:.2f}",
            f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})",
            f"{peak['eager']:.0f} / {peak['optimize']:.0f} / {peak['reduce-overhead']:.0f}",
        ])  # fmt: skip
    head = ["model", "inputs", "eager, ms", "optimize, ms", "reduce-overhead, ms", "chosen", "× eager",
            "× reduce-overhead (95 %)", "peak MB: eager / optimize / reduce-overhead"]  # fmt: skip
    return f"{table(head, body)}\n\n{measured_on(found)}"


def int8(found: dict[str, Any]) -> str:
    """Quantised Programs against peers."""
    body = []
    for row in found["rows"]:
        if "failed" in row:
            body.append([row["name"], "", row["failed"], "", "", "", ""])
            continue
        for name, rival in row["rivals"].items():
            if "failed" in rival or "ms" not in rival:
                body.append([row["name"], name, "failed", "", "", "", str(rival.get("failed", ""))[:80]])
                continue
            against = "–"
            if "ours_is_faster_by" in rival:
                against = f"{rival['ours_is_faster_by']:.2f} ({rival['ours_low']:.2f}–{rival['ours_high']:.2f})"
            matched = {True: "yes", False: "no"}.get(rival.get("matched"), "–")
            chosen = f" ({rival['chosen']})" if "chosen" in rival else ""
            body.append([
                row["name"], name + chosen, f"{rival['ms']:.2f}", f"{rival['speedup']:.2f}", f"{rival['error']:.2%}",
                matched, against,
            ])  # fmt: skip
    head = ["model", "by", "ms", "× eager", "error", "error matched", "speed of deepseek-r1 over it (95 %)"]
    return f"{table(head, body)}\n\n{measured_on(found)}"


def custom_op(cpu: dict[str, Any], gpu: dict[str, Any]) -> str:
    """C++ operators."""
    body = []
    for device, result in (("CPU", cpu), ("GPU", gpu)):
        for name, row in result.get("results", {}).items():
            ratio, ms = row["operator_speed_over"]["inductor"], row["ms_per_call"]
            body.append([
                name, device, f"{ms['eager']:.3g}", f"{ms['inductor']:.3g}", f"{ms['operator']:.3g}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})",
                f"{row['gigabytes_per_s_of_operator']:.0f}",
            ])  # fmt: skip
    head = ["operator", "on", "eager, ms", "Inductor, ms", "C++, ms", "speed over Inductor (95 %)", "GB/s"]
    return "\n\n".join([table(head, body), *(measured_on(result) for result in (cpu, gpu) if result)])


def memory(found: dict[str, Any]) -> str:
    """Memory and reload."""
    held, opened = found["memory"], found["reload"]
    rows = [
        ["peak memory of a process, ResNet-50: eager", f"{held['bytes']['eager'] / 1e6:.0f} MB", "–"],
        ["the same: int8 artifact", f"{held['bytes']['artifact'] / 1e6:.0f} MB", f"{held['ratio']:.2f} of eager"],
        [f"opening BERT-base ({opened['engine']}): from the cache", f"{opened['cpu_s']['cache']:.2f} CPU s", "–"],
        [
            "the same: the engine's own load and a checksum of the weights", f"{opened['cpu_s']['bare']:.2f} CPU s",
            f"the cache costs {opened['cache_over_bare']:.2f} times that",
        ],
        [
            "the same: compiling again", f"{opened['cpu_s']['compile']:.2f} CPU s",
            f"the cache is {opened['compile_over_cache']:.1f} times as fast",
        ],
    ]  # fmt: skip
    return f"{table(['what', 'measured', 'ratio'], rows)}\n\n{measured_on(found)}"


def passes(found: dict[str, Any], on_gpu: dict[str, Any]) -> str:
    """What each pass gains where it gains most."""
    models = found["models"]
    body = []
    for name, row in found["best"].items():
        other = on_gpu["best"].get(name, row)
        row = other | {"where": f"{other['where']}, GPU"} if other["gain"] > row["gain"] else row
        changed = sum(change["pass"] == name for model in models.values() for change in model["changes"])
        stays = "yes" if name in PASSES else "no"
        gain = f"{row['gain']:.3f}" if row["where"] else "none that is sure"
        body.append([f"`{name}`", f"{changed} of {len(models)}", gain, row["where"] or "–", stays])
    heads = ["pass", "models that it changes", "largest gain", "where", "stays"]
    ran = Counter(engine for model in models.values() for engine in model["engines"])
    engines = ", ".join(f"{engine} {count}" for engine, count in ran.most_common())
    together = sorted(
        (
            (measured["gains"]["plain"]["gain"], f"{model} on {engine}")
            for model, result in models.items()
            for engine, measured in result["engines"].items()
            if measured.get("gains", {}).get("plain", {"low": 0})["low"] > 1
        ),
        reverse=True,
    )
    largest = ", ".join(f"{where} {gain:.2f}" for gain, where in together[:8])
    return (
        f"{table(heads, body)}\n\nAll passes together gain most for {largest}. "
        f"Models measured on each engine: {engines}; on the GPU {', '.join(on_gpu['models'])} alone.\n\n"
        f"{measured_on(found)}\n\n{measured_on(on_gpu)}"
    )


def from_page(make: Callable[[dict[str, Any]], page.Page]) -> Callable[[dict[str, Any]], str]:
    """A table of `quantization.page`, what is said below it, and what it was measured on."""

    def made_of(found: dict[str, Any]) -> str:
        head, body, below = make(found)
        if not body:
            return "Not measured."
        where = measured_on(found.get("about", found))
        return "\n\n".join(part for part in (table(head, body), "\n".join(below), where) if part)

    return made_of


def for_each(make: Callable[[dict[str, Any]], page.Page]) -> Callable[..., str]:
    """One table after the other, of several files of one form."""
    return lambda *found: "\n\n".join(from_page(make)(one) for one in found if one)


def kernels(found: dict[str, Any]) -> str:
    """The native integer kernels."""
    others = ("torch fp32", "torch int4 weights", "torch int8 product", "torch int8 dynamic",
              "onnxruntime int8 dynamic", "onnxruntime 4 bits")  # fmt: skip
    body = []
    for row in found["rows"]:
        ms = {name: value["ms"] for name, value in row["kernels"].items()}
        # Of its formats and arrangements the fastest.
        llama = min((value for name, value in ms.items() if name.startswith("llama.cpp")), default=None)
        mine = [f"{ms[name]:.3g}" for name in ("int4 g32", "int4 g64", "int4 g128", "int8")]
        theirs = [f"{ms[name]:.3g}" if name in ms else "–" for name in others]
        body.append([
            row["layer"].replace("x", " × "), row["rows"], "no" if row["out_of_cache"] else "yes", *mine,
            f"{ms['int8'] / ms['int4 g64']:.2f}", f"{ms['onnxruntime int8 dynamic'] / ms['int8']:.2f}",
            *theirs, "–" if llama is None else f"{llama:.3g}",
        ])  # fmt: skip
    head = ["layer", "rows", "in cache", "int4 g32, ms", "int4 g64", "int4 g128", "int8", "speed of int4 g64 over int8",
            "speed of int8 over onnxruntime's", *others, "llama.cpp 4 bits"]  # fmt: skip
    return f"{table(head, body)}\n\n{measured_on(found)}"


#: Name of a table -> the result files it is made from, and what makes it.
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "zoo": (("optimize_zoo_cpu",), zoo),
    "gpu-zoo": (("gpu_zoo",), gpu_zoo),
    "int8": (("int8_peers",), int8),
    "custom-op": (("custom_op", "custom_op_cuda"), custom_op),
    "memory": (("memory_and_reload",), memory),
    "kernels": (("kernels",), kernels),
    "passes": (("passes", "passes_cuda"), passes),
    "ptq": (("ptq_peers",), from_page(page.ptq)),
    "quantization-search": (("quantization_search",), from_page(page.search)),
    "pruning": (("pruning",), from_page(page.pruning)),
    "joint": (("joint",), from_page(page.joint)),
    "training-step": (("training_step",), from_page(training_page.step)),
    "training-gpt": (("training_gpt",), from_page(training_page.gpt)),
    "training-lora": (("training_step",), from_page(training_page.lora)),
    "training-memory": (("training_memory", "training_memory_cuda"), for_each(training_page.memory)),
    "training-loss": (("training_loss",), from_page(training_page.loss)),
    "packing": (("packing",), from_page(training_page.packing)),
    "four-bits": (("four_bits",), from_page(page.four_bits)),
    "quantization-exports": (("quantization_exports",), from_page(page.exports)),
}


def made(name: str) -> str:
    """A table, or that nothing was measured for it."""
    files, make = TABLES[name]
    found = [read(file) for file in files]
    return make(*found) if any(found) else "Not measured."


def filled(text: str) -> str:
    """The page with its tables made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{made(match[2])}\n\n{match[3]}", text)


def main() -> None:
    text = PAGE.read_text()
    new = filled(text)
    if "--check" in sys.argv[1:]:
        sys.exit("docs/benchmarks.md is not what its JSON says: run python benchmarks/tables.py" if new != text else 0)
    atomic.write_bytes(PAGE, new.encode())


if __name__ == "__main__":
    main()
