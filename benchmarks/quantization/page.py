"""The tables of docs/benchmarks.md about quantisation: heads, rows and what is said below; `tables.py` prints them."""

# ruff: noqa: RUF001 - tables have dashes and signs of their own
from __future__ import annotations

from typing import Any

Page = tuple[list[str], list[list[str]], list[str]]
_OURS = "deepseek-r1"


def _interval(three: list[float]) -> str:
    return f"{three[1]:.2f} ({three[0]:.2f}–{three[2]:.2f})"


def ptq(found: dict[str, Any]) -> Page:
    """`quantize` and `optimize` against peers."""
    head = [
        "network", "by", "task metric", "loss", "its loss less ours (95 %)", "ms", "× eager",
        "speed of ours over it (95 %)", "file, MB",
    ]  # fmt: skip
    body, below = [], []
    for row in found["rows"]:
        latency, verdict = row.get("latency", {}), row.get("verdict", {})
        for name, rival in row["rivals"].items():
            if "failed" in rival:
                body.append([row["name"], name, f"failed: {_short(rival['failed'])}", *["–"] * 6])
                continue
            difference = verdict.get("loss_against", {}).get(name)
            # The other way round: what is above zero is in favour of ours.
            less = f"{-difference[1]:.2g} ({-difference[2]:.2g}–{-difference[0]:.2g})" if difference else "–"
            ms, speed = latency.get("ms", {}).get(name), latency.get("over_eager", {}).get(name)
            over = latency.get("ours_over", {}).get(name)
            body.append([
                row["name"], f"{name} ({rival['how']})" if name == _OURS else name, f"{rival['metric']:.4f}",
                f"{rival['loss']:.3g}", less, f"{ms:.3g}" if ms else "–", f"{speed[1]:.2f}" if speed else "–",
                _interval(over) if over else "–", f"{rival['file_bytes'] / 1e6:.2f}",
            ])  # fmt: skip
        if verdict:
            below.append(f"- {_verdict(row, verdict, latency)}")
    return head, body, below


def _verdict(row: dict[str, Any], verdict: dict[str, Any], latency: dict[str, Any]) -> str:
    better = "higher" if row["higher_is_better"] else "lower"
    metric = "no worse than" if verdict["metric_no_worse"] else "**worse than**"
    said = f"{row['name']} ({row['metric']}, {better} is better): {metric} the best peer, {verdict['best_peer']}"
    if "speed_over_fastest" in verdict:
        fast = "" if verdict["fast_enough"] else " (**below 0.97**)"
        low, _, high = latency["noise"]
        speed = verdict["speed_over_fastest"][1]
        said += f"; {speed:.2f} of the speed of the fastest, {verdict['fastest_peer']}{fast}"
        said += f"; eager against itself {low:.2f}–{high:.2f}"
    return said + "."


def _short(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:90]


def exports(found: dict[str, Any]) -> Page:
    """Formats as ONNX files."""
    head = ["network", "format", "opset", "nodes", "file, MB", "same decisions in onnxruntime", "widest margin lost"]
    body = []
    for row in found["rows"]:
        refused: dict[str, list[str]] = {}
        for name, fmt in row["formats"].items():
            if "refused" in fmt:
                refused.setdefault("no linear layer whose inputs divide into its groups", []).append(name)
                continue
            nodes = ", ".join(f"{count} {kind}" for kind, count in sorted(fmt["qdq"].items()))
            lost, usual = fmt["widest_margin_of_the_others"], fmt["median_margin"]
            margin = f"{lost:.2g} of {usual:.2g}" if fmt["same"] < 1 else "–"
            body.append([
                row["name"], name, str(fmt["opset"]), nodes, f"{fmt['file_bytes'] / 1e6:.2f}",
                f"{fmt['same']:.2%} of {fmt['decisions']:,}", margin,
            ])  # fmt: skip
        for why, names in refused.items():
            body.append([row["name"], ", ".join(names), "–", f"refused: {why}", "–", "–", "–"])
    return head, body, []


def four_bits(found: dict[str, Any]) -> Page:
    """The GPT with 4-bit weights."""
    head = ["by", "group", "perplexity", "× bfloat16 (95 %)", "loss of ours less its loss (95 %)"]
    body = []
    for row in found["rows"]:
        if "failed" in row:
            body.append([row["by"], str(row["group"]), f"failed: {_short(row['failed'])}", "–", "–"])
            continue
        low, middle, high = row["over_bfloat16"]
        less = row["ours_less_it"]
        own = "–" if row["by"] == _OURS else f"{less[1]:.2g} ({less[0]:.2g}–{less[2]:.2g})"
        over = f"{middle:.4f} ({low:.4f}–{high:.4f})"
        body.append([row["by"], str(row["group"]), f"{row['perplexity']:.3f}", over, own])
    return head, body, []


#: Rows of the table of pruning, in order.
_PRUNED = {
    "base": "not pruned",
    "ours": _OURS,
    "torch-pruning": "Torch-Pruning",
    "dense": "dense, as small, trained as long",
    "dense-taught": "the same, taught by the float network",
    "ours-int8": f"{_OURS}, int8",
    "torch-pruning-int8": "Torch-Pruning, torchao in int8",
    "dense-int8": "dense, int8",
}


def pruning(found: dict[str, Any]) -> Page:
    """Pruned networks, in float and trained in int8; accuracies are means over the seeds."""
    head = ["parameters gone", "by", "parameters", "accuracy", "ours less it, points", "loss", "file, MB"]
    body, below = [], []
    for sparsity, result in found["results"].items():
        gone, means, int8 = f"{float(sparsity):.0%}", result["means"], result.get("int8", {})
        key = "ours minus others (mean, standard error)"
        for name in (n for n in _PRUNED if n in means):
            mean = means[name]
            less = (int8 if name.endswith("int8") else result)[key][name]
            # Bytes of torchao's module are not those of a file.
            size = f"{mean['file_bytes'] / 1e6:.2f}" if "float_bytes" in mean else "–"
            apart = "–" if name.startswith("ours") else f"{100 * less[0]:.2f} ± {100 * less[1]:.2f}"
            body.append([
                "–" if name == "base" else gone, _PRUNED[name], f"{mean['parameters'] / 1e3:.0f} k",
                f"{mean['accuracy']:.4f}", apart, f"{mean['loss']:.3f}", size,
            ])  # fmt: skip
        said = f"- {gone} gone, {result['seeds']} seeds: ours keeps {result['accuracy kept']:.1%} of the accuracy"
        if int8:
            said += f"; in int8 {int8['accuracy kept']:.1%}, in {int8['share of the float file']:.1%} of the float file"
        below.append(f"{said}. ± is one standard error.")
    return head, body, below


def joint(found: dict[str, Any]) -> Page:
    """Bits alone, pruning first, and both together, under equal budgets."""
    head = [
        "budget, of float",
        "by",
        "accuracy",
        "loss",
        "loss of together less it (95 %)",
        "weights, kB",
        "× float ms",
    ]
    body = []
    for budget, result in found["results"].items():
        for name, row in result["rows"].items():
            low, middle, high = row.get("loss of together less this", (None, None, None))
            less = "–" if low is None or name == "together" else f"{middle:.3f} ({low:.3f}–{high:.3f})"
            body.append([
                budget, name, f"{row['accuracy']:.4f}", f"{row['loss']:.3f}", less, f"{row['bytes'] / 1e3:.0f}",
                _interval(row["of float"]),
            ])  # fmt: skip
        body += [[budget, name, f"none: {_short(why)}", *["–"] * 4] for name, why in result["failed"].items()]
    return head, body, []


def search(found: dict[str, Any]) -> Page:
    """Points of the search, those on the frontier in bold."""
    head = ["network", "formats", "task metric", "loss", "divergence", "latency, × float32", "file, MB", "layers"]
    body, below = [], []
    for row in found["rows"]:
        for label, point in row["points"].items():
            if "failed" in point:
                body.append([row["name"], label, f"none: {_short(point['failed'])}", *["–"] * 5])
                continue
            shown = f"**{label}**" if label in row.get("frontier", []) else label
            latency = f"{point['latency']:.2f}" if "latency" in point else "–"
            layers = ", ".join(f"{int(n)} {k.removeprefix('layers in ')}" for k, n in point["layers"].items())
            size = f"{point['file_bytes'] / 1e6:.2f}"
            losses = [f"{point['metric']:.4f}", f"{point['loss']:.3g}", f"{point['divergence']:.3g}"]
            body.append([row["name"], shown, *losses, latency, size, layers])
        searched = row.get("effective_bits", {})
        if "failed" in searched:
            below.append(f"- {row['name']}: no effective bits: {_short(searched['failed'])}")
        elif searched:
            below.append(f"- {row['name']}: ModelOpt took {searched['seconds']:.0f} s to calibrate and score.")
        if found_out := row.get("verdict"):
            below.append(f"- {row['name']}: {_searched(row, found_out)}")
    return head, body, below


def _searched(row: dict[str, Any], verdict: dict[str, Any]) -> str:
    said = []
    for kind in ("uniform", "effective-bits"):
        rivals = [v for n, v in verdict["against"].items() if n.startswith(kind)]
        if rivals:
            loss, speed = (sum(v[k] for v in rivals) for k in ("lower_loss", "lower_latency"))
            said.append(
                f"of {len(rivals)} points of {kind}, ours diverges less at no more latency than {loss}, and is faster "
                f"at no more divergence than {speed}"
            )
    if given := row.get("returned", {}).values():
        worse, better = (sum(v[f"surely_{k}"] for v in given) for k in ("worse", "better"))
        said.append(
            f"asked for the latency of each of {len(given)} uniform formats, `quantize(budget=...)` diverges surely "
            f"less {better} times, and surely more without being faster {worse} times"
        )
    for measure, what in (("latency", "latency relative to float32"), ("loss", "loss")):
        if measure in verdict:
            quality = verdict[measure]
            error = f"mean error {quality['mape']:.1%}, " if measure == "latency" else ""
            said.append(f"predicted {what}: {error}rank correlation {quality['spearman']:.2f}")
    if "search" in row:
        search = row["search"]
        said.append(f"search {search['cpu_seconds']:.0f} CPU s for {search['parameters'] / 1e6:.1f} M parameters")
    return "; ".join(said) + "."
