"""A quantised Program after `optimize`, against what each peer makes of the same module in int8.

    python benchmarks/int8_peers.py [--only resnet50,mobilenet_v2,bert_base,gpt2_decode] [--rounds 60] [--seconds 60]

Peers, each driven as its own documentation says: OpenVINO with NNCF's post-training quantisation (transformers: with
`model_type=TRANSFORMER`), ONNX Runtime's static (QDQ) and dynamic quantisation of an export by `torch.onnx`, and
ExecuTorch with XNNPACK's quantiser (dynamic activations for transformers). They get fixed sizes, ours stay dynamic.

All calibrate on the same random batches, and are judged on others: the error is the root mean square of the difference
from eager float32, relative to how far its answers to different inputs lie from their mean. A peer is matched if its
error is at most 1.25 times ours. Then all are timed in turns in one process, eager twice. Weights are random, so no
accuracy is claimed; but the convolutional networks are first trained for a minute or two, to tell eight orientations of
stripes apart. As initialised they are either blind to the input or so chaotic that bfloat16 alone changes everything.

Results go to benchmarks/results/int8_peers.json, model by model.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.utils._pytree as pytree
from optimize_zoo import about
from zoo import Entry, entry

from deepseek_r1 import quantize
from deepseek_r1.core import Budget, atomic
from deepseek_r1.engines import RaceConfig, optimize
from deepseek_r1.graph import as_inputs
from deepseek_r1.measure import paired_latency, ratio_interval
from deepseek_r1.runtime._openvino import load_openvino

RESULT = Path(__file__).parent / "results" / "int8_peers.json"
MODELS = ("resnet50", "mobilenet_v2", "bert_base", "gpt2_decode")
TRANSFORMERS = ("bert_base", "gpt2_decode")
#: How much larger than ours a peer's error may be.
MATCHED = 1.25
BAR = 0.97
ORIENTATIONS, TRAINING_STEPS, TRAINING_SIZE = 8, 150, 96

Leaves = list[Any]
Call = Callable[[], Leaves]
#: Gives the call that a user would make with these inputs; what it takes to get them there is not timed.
Run = Callable[[Leaves], Call]


class Flat(torch.nn.Module):
    """The module on a flat list of inputs, with flat outputs, as the peers' readers want it."""

    def __init__(self, module: torch.nn.Module, example: Any) -> None:
        super().__init__()
        self.module = module
        self.tree = pytree.tree_flatten(example)[1]

    def forward(self, *leaves: torch.Tensor) -> Any:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.tree)
        found = [v for v in pytree.tree_leaves(self.module(*args, **kwargs)) if isinstance(v, torch.Tensor)]
        return found[0] if len(found) == 1 else tuple(found)


def ours(module: torch.nn.Module, batches: list[Any], folder: Path, transformer: bool) -> tuple[Run, dict[str, Any]]:
    """The module in int8, raced on every engine beside its float parent, as a user gets it."""
    data = [kwargs or (args if len(args) != 1 else args[0], None) for args, kwargs in batches]
    start = time.perf_counter()
    program = quantize(module, dataset=data, example_inputs=batches[0][1] or batches[0][0])
    quantised_s = time.perf_counter() - start
    # Random weights have no accuracy to lose; the error is measured below.
    budget = Budget(accuracy_drop=1.0)
    fast = optimize(program, dataset=data[:2], budget=budget, race=RaceConfig(cache=False, timeout_s=600))
    tree = pytree.tree_flatten(batches[0])[1]

    def run(leaves: Leaves) -> Call:
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return functools.partial(fast, *args, **kwargs)

    rows = {r.metric: r.after for r in fast.report.rows if r.metric.startswith("latency")}
    chosen = f"{fast.engine} {fast.precision}"
    return run, {"chosen": chosen, "quantise_s": quantised_s, "race": rows, "skipped": dict(fast.report.skipped)}


def _openvino_run(model: Any) -> Run:
    openvino = load_openvino()
    compiled = openvino.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()

    def run(leaves: Leaves) -> Call:
        arrays = [v.numpy() for v in leaves]

        def call() -> Leaves:
            found = request.infer(arrays, share_inputs=True, share_outputs=False)
            return [torch.from_numpy(found[port]) for port in compiled.outputs]

        return call

    return run


def openvino_nncf(flat: Flat, batches: list[Leaves], folder: Path, transformer: bool) -> tuple[Run, dict[str, Any]]:
    openvino = load_openvino()
    import nncf

    try:
        model = openvino.convert_model(torch.export.export(flat, tuple(batches[0])))
    except Exception:  # its reader of exported programs lacks some operators; the other documented way is ONNX
        model = openvino.convert_model(_onnx_file(flat, batches, folder))
    dataset = nncf.Dataset(batches, lambda leaves: [v.numpy() for v in leaves])
    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    return _openvino_run(nncf.quantize(model, dataset, subset_size=len(batches), **options)), {}


def _onnx_file(flat: Flat, batches: list[Leaves], folder: Path) -> Path:
    exported = torch.onnx.export(flat, tuple(batches[0]), dynamo=True, opset_version=20, verbose=False)
    model = exported.model_proto
    # Shapes that the exporter noted stand in the way of ONNX Runtime's quantiser.
    del model.graph.value_info[:]
    onnx.save(model, folder / "raw.onnx")
    return folder / "raw.onnx"


def _onnx_run(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(leaves: Leaves) -> Call:
        feed = {n: v.numpy() for n, v in zip(names, leaves, strict=True)}
        return lambda: [torch.from_numpy(v) for v in session.run(None, feed)]

    return run


def _prepared(source: Path) -> Path:
    """The file after ONNX Runtime's own preparation for quantisation."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = source.with_name("ready.onnx")
    try:
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        _onnx_run(ready)
    except Exception as e:  # its optimizer may add one tensor twice (as of 1.30)
        print(f"quant_pre_process without optimization: {str(e)[-100:]}", file=sys.stderr)
        quant_pre_process(source, ready, skip_symbolic_shape=True, skip_optimization=True)
    return ready


def onnxruntime_qdq(flat: Flat, batches: list[Leaves], folder: Path, transformer: bool) -> tuple[Run, dict[str, Any]]:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    source = _prepared(_onnx_file(flat, batches, folder))
    names = [i.name for i in onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).get_inputs()]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            leaves = next(self.rest, None)
            return None if leaves is None else {n: v.numpy() for n, v in zip(names, leaves, strict=True)}

    options = {"op_types_to_quantize": ["MatMul", "Gemm"]} if transformer else {}
    quantize_static(
        source, folder / "qdq.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, **options,
    )  # fmt: skip
    return _onnx_run(folder / "qdq.onnx"), {}


def onnxruntime_dynamic(
    flat: Flat, batches: list[Leaves], folder: Path, transformer: bool
) -> tuple[Run, dict[str, Any]]:  # fmt: skip
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = _prepared(_onnx_file(flat, batches, folder))
    quantize_dynamic(source, folder / "dynamic.onnx", weight_type=QuantType.QInt8, per_channel=True)
    return _onnx_run(folder / "dynamic.onnx"), {}


def executorch_xnnpack(
    flat: Flat, batches: list[Leaves], folder: Path, transformer: bool
) -> tuple[Run, dict[str, Any]]:  # fmt: skip
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    class Quantizer(XNNPACKQuantizer):
        def transform_for_annotation(self, model: Any) -> Any:
            # It turns the numbers that a transformer computes positions with into floats, which then index nothing.
            return model if transformer else super().transform_for_annotation(model)

    example = tuple(batches[0])
    quantizer = Quantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=transformer))
    prepared = prepare_pt2e(torch.export.export(flat, example).module(), quantizer)
    for leaves in batches:
        prepared(*leaves)
    lowered = to_edge_transform_and_lower(
        torch.export.export(convert_pt2e(prepared), example), partitioner=[XnnpackPartitioner()]
    )
    (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)
    program = Runtime.get().load_program(folder / "model.pte")
    method = program.load_method("forward")

    def run(leaves: Leaves) -> Call:
        return functools.partial(method.execute, [v.contiguous() for v in leaves])

    return run, {"keep": program}


PEERS = {
    "OpenVINO + NNCF": openvino_nncf,
    "ONNX Runtime QDQ": onnxruntime_qdq,
    "ONNX Runtime dynamic": onnxruntime_dynamic,
    "ExecuTorch XNNPACK": executorch_xnnpack,
}


def answers_of(call: Call) -> Leaves:
    """The floating-point tensors among a call's answers."""
    found = [v for v in pytree.tree_leaves(call()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return [v.double().clone() for v in found]


def error_of(run: Run, wanted: list[Leaves], batches: list[Leaves]) -> float:
    """Root mean square of the difference from float32, relative to that of its answers' distance from their mean."""
    signal = noise = 0.0
    means = [torch.stack(answers).mean(0) for answers in zip(*wanted, strict=True)]
    for leaves, answers in zip(batches, wanted, strict=True):
        found = answers_of(run([v.clone() for v in leaves]))
        for a, b, mean in zip(answers, found, means, strict=True):
            signal += float(((a - mean) ** 2).sum())
            noise += float(((a - b.reshape(a.shape)) ** 2).sum())
    return (noise / signal) ** 0.5


def stripes(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of coloured stripes in noise, and the number of each one's orientation."""
    generator = torch.Generator().manual_seed(seed)
    orientation = (torch.arange(count) + seed) % ORIENTATIONS
    angle = (orientation * torch.pi / ORIENTATIONS).view(-1, 1, 1)
    period, phase = torch.rand(2, count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.sin(2 * torch.pi * ((x * angle.cos() + y * angle.sin()) / (8 + 16 * period) + phase))
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    return colour * waves[:, None] + 0.3 * torch.randn(count, 3, size, size, generator=generator), orientation


def train(module: torch.nn.Module) -> None:
    """Teach a classifier the stripes, and let its batch norms see them at full size."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module.train()
    for step in range(TRAINING_STEPS):
        images, labels = stripes(32, TRAINING_SIZE, 1000 + 32 * step)
        loss = torch.nn.functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {float(loss):.3f}", file=sys.stderr, flush=True)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    with torch.no_grad():
        module(stripes(4 * ORIENTATIONS, 224, 0)[0])
    module.eval().requires_grad_(False)


def batches_of(one: Entry, count: int, small: bool) -> tuple[torch.nn.Module, list[Any]]:
    """The module, and inputs on which its answers differ."""
    module, example = one.make(small=small)
    if not any(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules()):
        return module, [
            as_inputs(example if seed == 0 else one.inputs(seed=seed, small=small)) for seed in range(count)
        ]
    train(module)
    return module, [as_inputs((stripes(1, example[0].shape[-1], seed)[0],)) for seed in range(count)]


def measure(one: Entry, rounds: int, seconds: float, small: bool) -> dict[str, Any]:
    """The row of one model."""
    module, batches = batches_of(one, 12, small)
    flat_batches = [pytree.tree_leaves(batch) for batch in batches]
    calibration, held_out = batches[:8], flat_batches[8:]
    flat = Flat(module, batches[0]).eval()

    def eager(leaves: Leaves) -> Call:
        return functools.partial(torch.inference_mode()(flat), *leaves)

    wanted = [answers_of(eager(leaves)) for leaves in held_out]
    runs: dict[str, Run] = {"eager": eager, "eager again": eager}
    about_rivals: dict[str, dict[str, Any]] = {}
    transformer = one.name in TRANSFORMERS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        for name, build in {"deepseek-r1": ours, **PEERS}.items():
            folder = Path(place) / name.replace(" ", "_")
            folder.mkdir()
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    if build is ours:
                        run, facts = ours(module, calibration, folder, transformer)
                    else:
                        run, facts = build(flat, flat_batches[:8], folder, transformer)
                facts["error"] = error_of(run, wanted, held_out)
                runs[name] = run
            except Exception as e:  # a peer that cannot do a model is a result
                facts = {"failed": f"{type(e).__name__}: {str(e)[:300]}"}
            about_rivals[name] = {**facts, "build_s": time.perf_counter() - start}
            print(name, {k: v for k, v in about_rivals[name].items() if k != "keep"}, file=sys.stderr, flush=True)
            gc.collect()
        calls = {name: run(held_out[0]) for name, run in runs.items()}
        times = paired_latency(calls, rounds=rounds, max_seconds=seconds)
    return _row(one, times, about_rivals)


def _row(one: Entry, times: dict[str, Any], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    own = times.get("deepseek-r1")
    rivals = {}
    for name, about_one in facts.items():
        about_one.pop("keep", None)
        if name in times:
            low, middle, high = ratio_interval(times["eager"], times[name])
            about_one |= {"ms": times[name].median_ms, "speedup": middle, "low": low, "high": high}
            if own and name != "deepseek-r1":
                low, middle, high = ratio_interval(times[name], own)
                about_one |= {"ours_is_faster_by": middle, "ours_low": low, "ours_high": high}
                about_one["matched"] = about_one["error"] <= MATCHED * facts["deepseek-r1"]["error"]
        rivals[name] = about_one
    peers = {n: r for n, r in rivals.items() if n != "deepseek-r1" and "ours_is_faster_by" in r}
    matched = {n: r for n, r in peers.items() if r["matched"]}

    def hardest(some: dict[str, Any]) -> str | None:
        return min(some, key=lambda n: some[n]["ours_is_faster_by"], default=None)

    best, best_matched = hardest(peers), hardest(matched)
    return {
        "name": one.name, "shapes": one.shapes, "eager_ms": times["eager"].median_ms,
        "rounds": len(times["eager"].seconds),
        "noise": ratio_interval(times["eager"], times["eager again"]), "rivals": rivals, "best_peer": best,
        "best_matched_peer": best_matched,
        # Nothing is claimed where no peer is as exact.
        "meets_bar": None if best_matched is None else matched[best_matched]["ours_is_faster_by"] >= BAR,
        "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--small", action="store_true", help="the zoo's small variants, to try the script")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n@@row " + json.dumps(measure(entry(options.one), options.rounds, options.seconds, options.small)))
        return
    if options.small and options.out == RESULT:
        parser.error("--small needs --out: small variants are no results")
    rows = {r["name"]: r for r in json.loads(options.out.read_text())["rows"]} if options.out.is_file() else {}
    for name in options.only.split(",") if options.only else MODELS:
        command = [sys.executable, __file__, "--one", name, "--rounds", str(options.rounds)]
        command += ["--seconds", str(options.seconds), *(["--small"] if options.small else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            rows[name] = {"name": name, "failed": f"exit code {done.returncode}"}
        else:
            rows[name] = json.loads(done.stdout.rpartition("@@row ")[2])
        atomic.write_json(options.out, about("cpu") | {"rows": list(rows.values())})
        for peer, facts in rows[name].get("rivals", {}).items():
            kept = ("ms", "speedup", "error", "ours_is_faster_by", "matched", "chosen", "failed")
            print(name, peer, {k: facts[k] for k in kept if k in facts}, flush=True)


if __name__ == "__main__":
    main()
