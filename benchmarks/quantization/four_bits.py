"""The GPT with 4-bit weights: perplexity of ours, of torchao's and of GPTQ by the book, at the same group.

    python benchmarks/quantization four-bits [--groups 32,64]

All of them quantise every linear layer, the head included, and compute in float32 with the weights that come out
(torchao's packed kernels in what they take), so that the weights alone are compared. Perplexity is that of plays that
nobody trained or calibrated on; ratios to bfloat16 and differences of the loss are paired, sequence by sequence.

GPTQ by the book (Frantar et al., OPTQ, ICLR 2023) is written here: layers in the order in which they run, each seeing
what the quantised ones before it give; damping of 1 % of the mean diagonal, columns in order, a new scale and zero
point by min and max at the start of each group. torchao's own GPTQ cannot be run: its 4-bit form needs a library for
CUDA (0.18). Rows that are in the JSON already are not measured again; what they lost on each sequence is in the cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about
from torch import Tensor, nn

from deepseek_r1.core import Int4Weight, atomic
from deepseek_r1.quantization import PTQConfig, quantize

from . import nets
from .cache import folder
from .intervals import mean_difference

RESULT = Path(__file__).parents[1] / "results" / "four_bits.json"
NET = "gpt_shakespeare"
OURS = "deepseek-r1"


def grid(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of 16 levels between the least and the largest of each row (zero included)."""
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-9)
    return scale, (-low / scale).round()


def rounded(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of the levels."""
    return scale * ((values / scale + zero).round().clamp(0, 15) - zero)


def gptq_weight(weight: Tensor, moments: Tensor, group: int, damping: float = 0.01) -> Tensor:
    """Round one column after the other; what each loses is made good by those still to come.

    Args:
        weight: [out, in]; moments: mean of x xᵀ over what the layer sees, [in, in].
    """
    work, hessian = weight.clone(), moments.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    work[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for column in range(work.shape[1]):
        if column % group == 0:
            scale, zero = grid(work[:, column : column + group])
        level = rounded(work[:, column : column + 1], scale, zero)
        error = (work[:, column : column + 1] - level) / upper[column, column]
        work[:, column + 1 :] -= error @ upper[column : column + 1, column + 1 :]
        work[:, column : column + 1] = level
    return work


def gptq(model: nn.Module, batches: list[Tensor], group: int) -> nn.Module:
    """Every linear layer in turn, on what it sees when those before it are quantised."""
    model = copy.deepcopy(model)
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        seen = [torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64), 0]

        def observe(_: nn.Module, inputs: tuple[Tensor, ...], seen: list[Any] = seen) -> None:
            rows = inputs[0].flatten(0, -2).double()
            seen[0] += rows.T @ rows
            seen[1] += len(rows)

        handle = layer.register_forward_pre_hook(observe)
        for batch in batches:
            model(batch)
        handle.remove()
        layer.weight.data = gptq_weight(layer.weight.data.double(), seen[0] / seen[1], group).float()
    return model


def _torchao(model: nn.Module, group: int, algorithm: str) -> nn.Module:
    # Its form for CPUs is among the prototypes (0.18).
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    model = copy.deepcopy(model)
    choose = Int4ChooseQParamsAlgorithm(algorithm)
    config = PrototypeInt4WeightOnlyConfig(group_size=group, int4_choose_qparams_algorithm=choose)
    quantize_(model, config)
    return model


def _torchao_nearest(model: nn.Module, group: int) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    model = copy.deepcopy(model)
    how = {"weight_dtype": torch.int4, "granularity": PerGroup(group), "mapping_type": MappingType.ASYMMETRIC}
    quantize_(model, IntxWeightOnlyConfig(**how))
    return model


def rivals(group: int) -> dict[str, Callable[[nn.Module, list[Any]], Any]]:
    """Who gives 4-bit weights in groups of this size; each takes the float model and the calibration batches."""
    config = PTQConfig(format=Int4Weight(group_size=group))
    return {
        OURS: lambda model, batches: quantize(model, dataset=batches, config=config),
        f"{OURS}, no data": lambda model, batches: quantize(model, example_inputs=batches[0][0], config=config),
        "GPTQ by the book": lambda model, batches: gptq(model, [x for x, _ in batches], group),
        "torchao int4, tinygemm": lambda model, batches: _torchao(model, group, "tinygemm"),
        "torchao int4, hqq": lambda model, batches: _torchao(model, group, "hqq"),
        "torchao intx, asymmetric": lambda model, batches: _torchao_nearest(model, group),
    }


@torch.no_grad()
def losses_of(name: str, make: Callable[[], Any]) -> list[float]:
    """What a model loses on each held-out sequence; kept in the cache folder."""
    kept = folder("four_bits") / f"{name}.json"
    if not kept.is_file():
        net, model = nets.net(NET), make()
        found = nets.answers(nets.module_answer(model, net.held_out[0][0]), net.held_out)
        labels = nets.labels_of(net.held_out)
        atomic.write_json(kept, net.losses(found, labels, found).tolist())
    told: list[float] = json.loads(kept.read_text())
    return told


def row_of(name: str, group: int, make: Callable[[nn.Module, list[Any]], Any]) -> dict[str, Any]:
    """Perplexity of a rival, against bfloat16 and against ours, or with what it failed."""
    net = nets.net(NET)
    start = time.perf_counter()
    try:
        found = losses_of(f"{name}, {group}", lambda: make(net.build(), net.calibration))
    except Exception as e:  # a peer that cannot is a result
        return {"by": name, "group": group, "failed": f"{type(e).__name__}: {str(e)[:200]}"}
    half = losses_of("bfloat16", lambda: net.build().bfloat16())
    own = losses_of(f"{OURS}, {group}", lambda: rivals(group)[OURS](net.build(), net.calibration))
    return {
        "by": name, "group": group, "perplexity": math.exp(sum(found) / len(found)),
        "over_bfloat16": [math.exp(v) for v in mean_difference(found, half)],
        "ours_less_it": mean_difference(own, found), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """The `four-bits` verb."""
    parser = argparse.ArgumentParser(prog="four-bits", description=__doc__)
    parser.add_argument("--groups", default="32,64")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    rows = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    for group in map(int, options.groups.split(",")):
        for name, make in rivals(group).items():
            if not any(r["by"] == name and r["group"] == group for r in rows):
                rows.append(row_of(name, group, make))
                atomic.write_json(options.out, about("cpu") | {"rows": rows})
                print(rows[-1], flush=True)
    return 0
