"""Post-training quantisation by others, each driven as its own documentation says, at fixed sizes of one sample.

A peer is built by `build`, in a process and with a Python of its own, into a folder; `open` gives the answers of what
lies there, in whatever process times them. NNCF has a Python of its own, see `--peer-python`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import int8_peers
import onnx
import torch
from torch import Tensor

import deepseek_r1 as dr1
from deepseek_r1.core import Budget
from deepseek_r1.data import unpack_batch
from deepseek_r1.engines import RaceConfig, optimize, to_onnx
from deepseek_r1.graph import capture
from deepseek_r1.quantization import PTQConfig, quantize
from deepseek_r1.runtime._openvino import load_openvino

from .nets import Answer, Net, labels_of, leaves, samples


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Somebody who quantises.

    Attributes:
        build: makes files in a folder from a network; what it returns is told in the result.
        open: what answers, from these files.
        batch_size: of the samples that it can take; None for any.
        files: those that a runtime reads, whose size is told.
        packages: whose versions are told.
        only: the kind of network it is for; empty for all.
    """

    build: Callable[[Net, Path], str]
    open: Callable[[Net, Path], Answer]
    files: tuple[str, ...]
    batch_size: int | None = 1
    packages: tuple[str, ...] = ()
    only: str = ""

    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in self.packages}


def flat(net: Net) -> int8_peers.Flat:
    """The float module on a flat list of inputs."""
    args, kwargs, _ = unpack_batch((net.one,))
    return int8_peers.Flat(net.build(), (args, kwargs)).eval()


def ours(net: Net, folder: Path, engines: list[str] | None = None) -> str:
    """`quantize`, then `optimize` among these engines, by default all; which one won, and among whom."""
    one, parts = net.one, samples(net.calibration)
    labels = labels_of(net.calibration)
    named = [dict(zip(one, p, strict=True)) if isinstance(one, dict) else p[0] for p in parts]
    data = [(inputs, labels[i : i + 1]) for i, inputs in enumerate(named)]
    budget = Budget(accuracy_drop=VALUES_DROP) if net.task == "values" else None
    program = capture(net.build(), one if isinstance(one, dict) else (one,), dynamic_shapes={})
    program = quantize(program, dataset=data, config=PTQConfig(calibration_batches=len(data)))
    race = RaceConfig(task=net.task, cache=False, timeout_s=600)
    fast = optimize(program, dataset=data, engines=engines, budget=budget, race=race)
    fast.save(folder / "executable")
    fast.report.save(folder / "report.json")
    # What ships, whichever engine won here.
    onnx.save(to_onnx(fast.program), folder / "model.onnx")
    return f"{fast.engine} {fast.precision}" + (f" of {', '.join(engines)}" if engines else "")


def _open_ours(net: Net, folder: Path) -> Answer:
    fast = dr1.Executable.load(folder / "executable")
    if isinstance(net.one, dict):
        names = list(net.one)
        return lambda parts: fast(**dict(zip(names, parts, strict=True)))
    return lambda parts: fast(*parts)


def _nncf(net: Net, folder: Path) -> str:
    openvino = load_openvino()
    import nncf

    batches = samples(net.calibration)
    model = openvino.convert_model(int8_peers._onnx_file(flat(net), batches[:1], folder))
    options = {"model_type": nncf.ModelType.TRANSFORMER} if net.is_transformer else {}
    found = nncf.quantize(model, nncf.Dataset(batches, lambda parts: [v.numpy() for v in parts]), **options)
    openvino.save_model(found, folder / "model.xml", compress_to_fp16=False)
    return "nncf.quantize" + (", model_type=TRANSFORMER" if options else "")


def _open_openvino(net: Net, folder: Path) -> Answer:
    run = int8_peers._openvino_run(load_openvino().Core().read_model(folder / "model.xml"))
    return _first(run)


def _first(run: int8_peers.Run) -> Answer:
    """A rival of `int8_peers` as an answer; what it fetches its inputs with is part of the call here."""
    return lambda parts: run(parts)()[0]


def _onnx_static(net: Net, folder: Path) -> str:
    int8_peers.onnxruntime_qdq(flat(net), samples(net.calibration), folder, net.is_transformer)
    return "quant_pre_process, quantize_static, QDQ, per channel" + (", MatMul and Gemm" if net.is_transformer else "")


def _onnx_dynamic(net: Net, folder: Path) -> str:
    int8_peers.onnxruntime_dynamic(flat(net), samples(net.calibration)[:1], folder, net.is_transformer)
    return "quant_pre_process, quantize_dynamic, per channel"


def _torchao(net: Net, folder: Path) -> str:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    batches = samples(net.calibration)
    example = tuple(batches[0])
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(flat(net), example).module(), quantizer)
        for parts in batches:
            prepared(*parts)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        exported = torch.export.export(converted, example)
        options = {"freezing": True}
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(folder / "model.pt2"), inductor_configs=options
        )
    return "X86InductorQuantizer, default config; Inductor ahead of time, freezing"


def _open_inductor(net: Net, folder: Path) -> Answer:
    run = torch._inductor.aoti_load_package(str(folder / "model.pt2"))

    def answer(parts: list[Tensor]) -> Tensor:
        found = run(*parts)
        return found[0] if isinstance(found, tuple | list) else found

    return answer


def _onnx_opener(name: str) -> Callable[[Net, Path], Answer]:
    return lambda net, folder: _first(int8_peers._onnx_run(folder / name))


OURS = "deepseek-r1"
#: Explained variance that `optimize` may lose where the answers are values.
VALUES_DROP = 0.1
RIVALS = {
    OURS: Rival(build=ours, open=_open_ours, files=("model.onnx",)),
    "NNCF": Rival(build=_nncf, open=_open_openvino, files=("model.xml", "model.bin"), packages=("nncf", "openvino")),
    "ONNX Runtime static": Rival(
        build=_onnx_static, open=_onnx_opener("qdq.onnx"), files=("qdq.onnx",), packages=("onnxruntime",)
    ),
    "ONNX Runtime dynamic": Rival(
        build=_onnx_dynamic,
        open=_onnx_opener("dynamic.onnx"),
        files=("dynamic.onnx",),
        packages=("onnxruntime",),
        only="transformer",
    ),
    "torchao PT2E": Rival(build=_torchao, open=_open_inductor, files=("model.pt2",), packages=("torchao",)),
}


def fresh(folder: Path) -> Path:
    """An empty folder in its place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def check_open(net: Net, answer: Answer) -> None:
    """Answer one sample, so that what opens and then fails is found out."""
    answer(leaves(net.one))
