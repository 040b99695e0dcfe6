"""Every integer format of every network as an ONNX file: its QDQ nodes, and whether onnxruntime answers the same.

    python benchmarks/quantization exports [--only digits]

"The same" is judged against the quantised Program in PyTorch, sample by sample: the largest class, the next token, the
nearest neighbour of an embedding, or which frames are speech. Where onnxruntime's kernels compute otherwise than the
Program says (see docs/quantization.md), close calls may go the other way; the table has the share, and how close the
closest of those calls were. A format that no layer of a network can have names the reason.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from optimize_zoo import about
from torch import Tensor

from deepseek_r1.core import (
    DeepSeekError,
    Int4Dynamic,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
    LayerFormat,
    atomic,
)
from deepseek_r1.engines import to_onnx

from . import nets
from .cache import folder
from .search import assigned

RESULT = Path(__file__).parents[1] / "results" / "quantization_exports.json"
FORMATS: tuple[LayerFormat, ...] = (
    Int8Static(), Int8Dynamic(), Int8Weight(), Int4Weight(group_size=32), Int4Weight(group_size=32, symmetric=True),
    Int4Weight(group_size=64), Int4Weight(group_size=128), Int4Dynamic(group_size=32),
)  # fmt: skip
_QDQ = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


def decisions(name: str, found: Tensor) -> Tensor:
    """What a network's answers are taken for: [samples] or [samples, ...] of whole numbers."""
    if name == "minilm":
        return nets.neighbours(found, 1)[:, 0]
    return (found > 0.5).long() if name == "silero_vad" else found.argmax(-1)


def margins(name: str, found: Tensor) -> Tensor:
    """How far from another decision each was, in units of the answers' spread."""
    if name == "minilm":
        unit = torch.nn.functional.normalize(found, dim=-1)
        found = (unit @ unit.T).fill_diagonal_(-2)
    if name == "silero_vad":
        return (found - 0.5).abs()
    best = found.topk(2, -1).values
    return (best[..., 0] - best[..., 1]) / found.std(-1).clamp(min=1e-9)


def onnx_answer(path: Path) -> nets.Answer:
    """onnxruntime as it is, without any of our own code."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def answer(parts: list[Tensor]) -> Tensor:
        feed = {n: np.ascontiguousarray(v.numpy()) for n, v in zip(names, parts, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return answer


def export(name: str, fmt: LayerFormat, path: Path) -> dict[str, Any]:
    """Quantise, write the file, run it; the row of the table."""
    net = nets.net(name)
    try:
        program = assigned(net, fmt)
    except DeepSeekError as e:
        return {"refused": str(e)[:300]}
    model = to_onnx(program)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    nodes = Counter(node.op_type for node in model.graph.node)
    blocked = any(a.name == "block_size" and a.i for node in model.graph.node for a in node.attribute)
    inputs = net.held_out[0][0]
    wanted = nets.answers(nets.module_answer(program, inputs), net.held_out)
    found = nets.answers(onnx_answer(path), net.held_out)
    same = decisions(name, found) == decisions(name, wanted)
    close = margins(name, wanted)
    return {
        "opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "qdq": {k: n for k, n in nodes.items() if k in _QDQ}, "others": sorted(set(nodes) - _QDQ)[:40],
        "domains": sorted({n.domain for n in model.graph.node if n.domain}), "blocked": blocked,
        "file_bytes": path.stat().st_size, "same": float(same.float().mean()), "decisions": same.numel(),
        "widest_margin_of_the_others": float(close[~same].max()) if not bool(same.all()) else 0.0,
        "median_margin": float(close.median()), "largest_difference": float((found - wanted).abs().max()),
        "float_layers": dict(list(program.report.skipped)[:8]),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """The `exports` verb."""
    parser = argparse.ArgumentParser(prog="exports", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="networks, separated by commas")
    parser.add_argument("--fresh", action="store_true", help="export again what was")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    rows = {r["name"]: r for r in json.loads(options.out.read_text())["rows"]} if options.out.is_file() else {}
    for name in options.only.split(",") if options.only else nets.NETS:
        row = rows.setdefault(name, {"name": name, "formats": {}})
        for fmt in FORMATS:
            if str(fmt) in row["formats"] and not options.fresh:
                continue
            row["formats"][str(fmt)] = found = export(name, fmt, folder("exports", name) / f"{fmt}.onnx")
            told = {k: found[k] for k in ("refused", "opset", "qdq", "same", "domains") if k in found}
            print(name, fmt, told, flush=True)
            atomic.write_json(options.out, about("cpu") | {"rows": list(rows.values())})
    return 0
