"""The native integer kernels against torch's and ONNX Runtime's, one linear layer at a time, on two threads.

    python benchmarks/quantization/kernels.py [--only 768x3072] [--rows 1,16,128,512] [--seconds 20]

For each number of rows and each layer (inputs x outputs) all kernels take turns. "In cache" is one layer again and
again; "out of cache" goes through as many copies of it as are larger than the last cache together. Ours are called as
the engine `native` calls them (`BoundOp`). The others:

- torch fp32: `torch.nn.functional.linear`.
- torch int4 weights: `_weight_int4pack_mm_for_cpu`, groups of 64, bfloat16 activations, as torchao drives it.
- torch int8 product: `_int_mm` on activations that are int8 already, so without scales, zero points and bias.
- torch int8 dynamic: `torch.ao.nn.quantized.dynamic.Linear`, one scale a channel; activations have one range a tensor.
- ONNX Runtime int8 dynamic: `DynamicQuantizeMatMul`, one scale a channel; activations have one range a tensor.
- ONNX Runtime 4 bits: `MatMulNBits`, groups of 64, zero points, `accuracy_level=4` (int8 activations).

- llama.cpp, with `--llama`: one row on its 4-bit weights, see `llama_gemv.cc`.

ONNX Runtime's copies are in one session, in which the layers read one input. Its calls and ours allocate their outputs.

Results go to benchmarks/results/kernels.json, layer by layer: for each kernel the fastest and the median turn. Ratios
are of the fastest turns: where a neighbour takes a core for a moment, two threads wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from optimize_zoo import about

from deepseek_r1 import ops
from deepseek_r1.core import atomic
from deepseek_r1.measure import paired_latency

RESULT = Path(__file__).resolve().parents[1] / "results" / "kernels.json"
LAYERS = {"768x3072": (768, 3072), "2048x5632": (2048, 5632), "4096x4096": (4096, 4096)}
ROWS = (1, 16, 128, 512)
GROUP = 64
#: Copies together are this many times as large as the last cache.
BEYOND = 1.25

Layer = Callable[[], Any]
#: Makes one turn that goes through some copies of a layer, and says how many bytes one copy has.
Make = Callable[[torch.Tensor, int, int], tuple[Layer, int]]


def last_cache() -> int:
    """Bytes of the last cache."""
    text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    return int(text.removesuffix("K")) * 1024


def turn(calls: list[Layer]) -> Layer:
    """One call of each."""

    def run() -> None:
        for call in calls:
            call()

    return run


def grouped(inputs: int, out: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = torch.randint(0, 16, (out, inputs), dtype=torch.uint8)
    scales = torch.rand(out, inputs // group) * 0.01 + 1e-3
    return values, scales, torch.randint(0, 16, scales.shape, dtype=torch.int8)


def ours_int4(group: int) -> Make:
    def make(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
        packed = ops.pack_int4(*grouped(x.shape[1], out, group))
        bound = [
            ops.BoundOp("int4_dynamic_linear", [packed.clone(), torch.zeros(out)], [group, 0, 0])
            for _ in range(copies)
        ]  # fmt: skip
        return turn([lambda b=b: b(x) for b in bound]), packed.numel()

    return make


def ours_int8(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
    values = torch.randint(-127, 128, (out, x.shape[1]), dtype=torch.int8)
    packed = ops.pack_int8(values, torch.rand(out) * 0.01 + 1e-3)
    bound = [ops.BoundOp("int8_dynamic_linear", [packed.clone(), torch.zeros(out)], [0, 0]) for _ in range(copies)]
    return turn([lambda b=b: b(x) for b in bound]), packed.numel()


def torch_fp32(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
    weight, bias = torch.randn(out, x.shape[1]), torch.zeros(out)
    weights = [weight.clone() for _ in range(copies)]
    return turn([lambda w=w: torch.nn.functional.linear(x, w, bias) for w in weights]), weight.nbytes


def torch_int4(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
    values, scales, zeros = grouped(x.shape[1], out, GROUP)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
    both = torch.stack([scales, (8 - zeros) * scales], -1).transpose(0, 1).contiguous().bfloat16()
    low, kept = x.bfloat16(), [(packed.clone(), both.clone()) for _ in range(copies)]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return turn([lambda w=w, s=s: product(low, w, GROUP, s) for w, s in kept]), packed.nbytes + both.nbytes


def torch_int_mm(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
    stored = x.mul(30).clamp(-127, 127).to(torch.int8)
    weight = torch.randint(-127, 128, (out, x.shape[1]), dtype=torch.int8)
    weights = [weight.clone().t() for _ in range(copies)]
    return turn([lambda w=w: torch._int_mm(stored, w) for w in weights]), weight.nbytes


def torch_int8(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.Sequential(torch.nn.Linear(x.shape[1], out))
        spec = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        kept = [torch.ao.quantization.quantize_dynamic(layer, spec)[0] for _ in range(copies)]
    return turn([lambda m=m: m(x) for m in kept]), out * x.shape[1]


def onnx_turn(x: torch.Tensor, out: int, copies: int, node: Callable[[int], tuple[Any, list[Any]]]) -> Layer:
    """A session with so many layers that read one input."""
    import onnxruntime

    made = [node(i) for i in range(copies)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", out]) for i in range(copies)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", x.shape[1]])]
    graph = helper.make_graph([n for n, _ in made], "layers", inputs, outputs, [t for _, ts in made for t in ts])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def onnx_int8(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
    inputs = x.shape[1]
    values = np.random.default_rng(0).integers(-127, 128, (inputs, out), dtype=np.int8)

    def node(i: int) -> tuple[Any, list[Any]]:
        names = [f"w{i}", f"s{i}", f"z{i}"]
        # No two alike: they could be stored once.
        arrays = [np.roll(values, i), np.full(out, 0.01, np.float32), np.zeros(out, np.int8)]
        made = helper.make_node("DynamicQuantizeMatMul", ["x", *names], [f"y{i}"], domain="com.microsoft")
        return made, [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]

    return onnx_turn(x, out, copies, node), values.nbytes


def onnx_int4(x: torch.Tensor, out: int, copies: int) -> tuple[Layer, int]:
    inputs, random = x.shape[1], np.random.default_rng(0)
    groups = inputs // GROUP
    values = random.integers(0, 256, (out, groups, GROUP // 2), dtype=np.uint8)
    zeros = random.integers(0, 256, out * ((groups + 1) // 2), dtype=np.uint8)

    def node(i: int) -> tuple[Any, list[Any]]:
        names = [f"w{i}", f"s{i}", f"z{i}"]
        arrays = [np.roll(values, i), np.full(out * groups, 0.01, np.float32), zeros]
        made = helper.make_node(
            "MatMulNBits", ["x", *names], [f"y{i}"], domain="com.microsoft", K=inputs, N=out, bits=4,
            block_size=GROUP, accuracy_level=4,
        )  # fmt: skip
        return made, [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]

    return onnx_turn(x, out, copies, node), values.nbytes + zeros.nbytes + 4 * out * groups


KERNELS: dict[str, Make] = {
    "int4 g32": ours_int4(32),
    "int4 g64": ours_int4(64),
    "int4 g128": ours_int4(128),
    "int8": ours_int8,
    "torch fp32": torch_fp32,
    "torch int4 weights": torch_int4,
    "torch int8 product": torch_int_mm,
    "torch int8 dynamic": torch_int8,
    "onnxruntime int8 dynamic": onnx_int8,
    "onnxruntime 4 bits": onnx_int4,
}
#: Bits of a stored weight, for the number of copies.
_BITS = {"int4": 4, "torch int4": 4, "onnxruntime 4": 4, "torch fp32": 32}


def copies_of(name: str, inputs: int, out: int) -> int:
    """So many that together they do not fit into the last cache."""
    bits = next((b for start, b in _BITS.items() if name.startswith(start)), 8)
    return max(2, -(-int(BEYOND * last_cache()) * 8 // (bits * inputs * out)))


def llama_cpp(binary: Path, layer: str, out_of_cache: bool) -> dict[str, dict[str, float]]:
    """One row in llama.cpp's kernels, by `llama_gemv.cc`; of its own rounds, not in turns with the others."""
    inputs, out = LAYERS[layer]
    copies = copies_of("int4", inputs, out) if out_of_cache else 1
    numbers = map(str, (inputs, out, copies, torch.get_num_threads(), 30))
    done = subprocess.run([binary, *numbers], capture_output=True, text=True, check=True)
    return {f"llama.cpp {kind}": {"ms": ms} for kind, ms in json.loads(done.stdout).items()}


def measure(layer: str, rows: int, out_of_cache: bool, rounds: int, seconds: float) -> dict[str, Any]:
    """One number of rows on one layer."""
    inputs, out = LAYERS[layer]
    torch.manual_seed(0)
    x = torch.randn(rows, inputs)
    turns: dict[str, Layer] = {}
    copies: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, make in KERNELS.items():
        copies[name] = copies_of(name, inputs, out) if out_of_cache else 1
        try:
            run, _ = make(x, out, copies[name])
            run()
            turns[name] = run
        except Exception as e:  # a kernel that cannot take a shape is a result
            failed[name] = f"{type(e).__name__}: {str(e)[:200]}"
    with torch.no_grad():
        times = paired_latency(
            turns, rounds=rounds, max_seconds=seconds, warmup=1, min_round_s=2e-3, pause_s=5e-3, settle_s=2e-3
        )
    found = {
        name: {"ms": min(t.seconds) * 1e3 / copies[name], "median_ms": t.median_ms / copies[name]}
        for name, t in times.items()
    }
    rounds_done = len(times["int8"].seconds)
    return {
        "layer": layer, "rows": rows, "out_of_cache": out_of_cache, "kernels": found, "failed": failed,
        "copies": copies, "rounds": rounds_done, "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(LAYERS), help="layers, separated by commas")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--places", default="in,out", help="in and out of cache")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=20, help="for one number of rows, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", type=Path, help="the program of llama_gemv.cc; its results join those of one row")
    parser.add_argument("--llama-version", default="", help="of llama.cpp, for the results")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if problem := ops.native_problem():
        parser.error(f"the kernels cannot run: {problem}")
    before = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    rows = {(r["layer"], r["rows"], r["out_of_cache"]): r for r in before["rows"]}
    for layer in options.only.split(","):
        for place in options.places.split(","):
            for count in map(int, options.rows.split(",")):
                row = measure(layer, count, place == "out", options.rounds, options.seconds)
                if options.llama and count == 1:
                    row["kernels"] |= llama_cpp(options.llama.resolve(), layer, place == "out")
                rows[layer, count, place == "out"] = row
                facts = about("cpu")
                if options.llama_version:
                    facts["versions"]["llama.cpp"] = options.llama_version
                atomic.write_json(options.out, before | facts | {"rows": [rows[k] for k in sorted(rows)]})
                text = ", ".join(f"{n} {v['ms']:.3g}" for n, v in row["kernels"].items())
                print(layer, count, place, text, row["failed"] or "", f"({row['rounds']} rounds)", flush=True)


if __name__ == "__main__":
    main()
