"""What an optimised model costs to hold and to open again.

    python benchmarks/memory_and_reload.py [--repeats 7]

Memory: peak resident memory of a fresh process that runs ResNet-50 at batch 1, 20 times: eager PyTorch, and the
exported int8 artifact in `deepseek_r1.runtime`. Reload: CPU seconds of a fresh process, whose imports and module are
not counted, until the first answer of BERT-base (128 tokens): from the cache of choices; the engine's own load of the
same files and a SHA-256 of the weights; and capture, passes and the engine's build. Processes take turns; medians are
compared.

Writes benchmarks/results/memory_and_reload.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about
from zoo import entry

from deepseek_r1 import deploy, quantize
from deepseek_r1.core import atomic
from deepseek_r1.engines import ChoiceCache, RaceConfig, optimize
from deepseek_r1.measure import peak_memory_of
from deepseek_r1.runtime import RUNTIMES
from deepseek_r1.runtime._openvino import load_openvino

HERE = Path(__file__).parent
RESULT = HERE / "results" / "memory_and_reload.json"
MODEL = "bert_base"
IMPORTS = {
    "onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript"),
    "inductor": ("torch._inductor.package",), "executorch": ("executorch.runtime", "executorch.exir"), "eager": (),
}  # fmt: skip

EAGER = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from zoo import entry
module, x = entry("resnet50").make()
with torch.inference_mode():
    for _ in range(20): module(x)
RESULT = None
"""
ARTIFACT = """
import sys
import numpy as np
from deepseek_r1.runtime import load
predictor = load(sys.argv[2])
x = np.zeros((1, 3, 224, 224), np.float32)
for _ in range(20): predictor(x)
RESULT = "torch" in sys.modules
"""


def memory(repeats: int) -> dict[str, Any]:
    """Peak memory of both, and their ratio."""
    one = entry("resnet50")
    module, x = one.make()
    program = quantize(module, dataset=[one.inputs(seed=seed) for seed in range(8)], example_inputs=x)
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "resnet50")
        deploy.export(program, place)
        found: dict[str, list[int]] = {"eager": [], "artifact": []}
        for _ in range(repeats):
            found["eager"].append(peak_memory_of(EAGER, [str(HERE)])[0])
            peak, has_torch = peak_memory_of(ARTIFACT, [str(HERE), place])
            assert not has_torch, "the artifact is run without torch"
            found["artifact"].append(peak)
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {"bytes": middle, "all": found, "ratio": middle["artifact"] / middle["eager"], "bar": 0.58}


def once(what: str, folder: Path) -> dict[str, Any]:
    """One measurement in this process."""
    import hashlib
    import importlib
    import time

    from deepseek_r1.engines import ENGINES, compile_program
    from deepseek_r1.graph import as_inputs, capture, simplify

    module, inputs = entry(MODEL).make()
    args, kwargs = as_inputs(inputs)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    (kept,) = ChoiceCache(folder).entries()
    plugin = ENGINES.get(kept.engine)()
    # A process imports these once, whatever it opens.
    if kept.engine in RUNTIMES.names():
        RUNTIMES.get(kept.engine)
    for name in IMPORTS[kept.engine]:
        importlib.import_module(name) if name != "openvino" else load_openvino()
    start, wall = time.process_time(), time.perf_counter()
    if what == "cache":
        fast = optimize(module, example_inputs=kwargs or args, race=RaceConfig(cache=folder))
        fast(*args, **kwargs)
        assert any(note.startswith("from the cache") for note in fast.report.notes), fast.report.notes
    elif what == "bare":
        digest = hashlib.sha256()
        for tensor in module.state_dict().values():
            digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        plugin.open(kept.files, lambda: None)(leaves)
    else:
        compile_program(plugin, simplify(capture(module, kwargs or args)))(leaves)
    return {"cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall, "engine": kept.engine}


def reload(repeats: int) -> dict[str, Any]:
    """CPU seconds of opening from the cache, of the bare load and of compiling again."""
    with tempfile.TemporaryDirectory() as folder:
        module, inputs = entry(MODEL).make()
        fast = optimize(module, example_inputs=inputs, race=RaceConfig(cache=folder))
        found: dict[str, list[dict[str, Any]]] = {"cache": [], "bare": [], "compile": []}
        for number in range(repeats):
            for what, values in found.items():
                if what == "compile" and number >= max(3, repeats // 2):
                    continue
                command = [sys.executable, __file__, "--once", what, "--folder", folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                values.append(json.loads(done.stdout.rpartition("@@once ")[2]))
    middle = {what: statistics.median(v["cpu_s"] for v in values) for what, values in found.items()}
    return {
        "engine": fast.engine, "cpu_s": middle, "all": found,
        "cache_over_bare": middle["cache"] / middle["bare"], "bar_over_bare": 1.15,
        "compile_over_cache": middle["compile"] / middle["cache"], "bar_compile": 5,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print("\n@@once " + json.dumps(once(options.once, options.folder)))
        return
    found = about("cpu") | {"memory": memory(options.repeats), "reload": reload(options.repeats)}
    atomic.write_json(options.out, found)
    print({k: v for k, v in found["memory"].items() if k != "all"})
    print({k: v for k, v in found["reload"].items() if k != "all"})


if __name__ == "__main__":
    main()
