"""What NVIDIA ModelOpt's `auto_quantize` makes of a network, as a format for each layer.

    PYTHON_WITH_MODELOPT benchmarks/quantization effective-bits --net minilm --bits 5,6,8 \\
        --formats '[{"format": "int8-dynamic"}, {"format": "int4-weight"}]' --out assignments.json

Its own calibration, its own gradient scores and its own solver, from its own package; the formats are ours, described
in its words. What it decides is then quantised and measured like everything else in `search`. It groups layers by the
names that TensorRT-LLM knows; ours have other names, so each layer is its own. A layer that it leaves alone is float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseek_r1.core import LayerFormat, atomic
from deepseek_r1.core.formats import Float32, Int4Format
from deepseek_r1.data import unpack_batch

from . import nets

Assignment = dict[str, dict[str, Any]]


def recipe(fmt: LayerFormat) -> dict[str, Any]:
    """A format as ModelOpt's configuration."""
    weight: dict[str, Any] = {"num_bits": fmt.weight_bits, "axis": 0}
    if isinstance(fmt, Int4Format):
        weight = {"num_bits": 4, "block_sizes": {-1: fmt.group_size}}
    ranges: dict[str, Any] = {"num_bits": 8, "axis": None}
    if fmt.activation == "dynamic":
        ranges = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
    inputs = {"enable": False} if fmt.activation == "float" else {"cfg": ranges}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight},
            {"quantizer_name": "*input_quantizer", **inputs},
        ],
        "algorithm": "max",
    }


def for_convolutions(fmt: LayerFormat) -> bool:
    """Whether a convolution can have the format."""
    return not isinstance(fmt, Int4Format) and fmt.activation != "dynamic"


def search(net: nets.Net, formats: list[LayerFormat], targets: list[float]) -> dict[str, Any]:
    """Assignments by target of effective bits, and the seconds that calibration and scores took."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.algorithms import _resolve_best_recipe

    model = net.build().requires_grad_(True)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    some = [recipe(fmt) for fmt in formats if for_convolutions(fmt)]
    spaces = [{"module_name_patterns": convolutions, "quantization_formats": some}] if convolutions and some else []
    losses = net.gradient_loss or net.losses

    def forward(module: nn.Module, batch: Any) -> torch.Tensor:
        args, kwargs, _ = unpack_batch(batch)
        return module(*args, **kwargs)

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return losses(output, batch[1], output.detach()).mean()

    start = time.perf_counter()
    _, state = mtq.auto_quantize(
        model, constraints={"effective_bits": max(targets)}, quantization_formats=[recipe(f) for f in formats],
        data_loader=net.calibration, forward_step=forward, loss_func=loss, num_calib_steps=len(net.calibration),
        num_score_steps=len(net.calibration), module_search_spaces=spaces or None,
        disabled_layers=convolutions if convolutions and not some else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    known = {json.dumps(_signature(recipe(fmt)), sort_keys=True): fmt for fmt in formats}
    found, infeasible = {}, []
    for bits in targets:
        chosen = _resolve_best_recipe(state, {"effective_bits": bits})
        # Its solver warns of a target that cannot be met, and returns something else.
        if spent(chosen, state) > bits + 0.01:
            infeasible.append(bits)
        else:
            found[str(bits)] = _assignment(chosen, state, known)
    return {"assignments": found, "infeasible": infeasible, "seconds": seconds}


def spent(chosen: dict[str, Any], state: dict[str, Any]) -> float:
    """Effective bits of an assignment, as ModelOpt counts them: weights alone, of 16 at most, without scales."""
    stats = state["candidate_stats"]
    costs = {n: one["costs"][one["formats"].index(chosen[n])] for n, one in stats.items()}
    return 16 * sum(costs.values()) / sum(max(one["costs"]) for one in stats.values())


def _signature(config: Any) -> Any:
    """Bits, blocks and kind of weights and inputs: what tells our formats apart in a recipe that was normalised."""
    told = {}
    for entry in config["quant_cfg"] if isinstance(config, dict) else config.quant_cfg:
        values = entry if isinstance(entry, dict) else entry.model_dump()
        name, given = values["quantizer_name"], values.get("cfg") or {}
        given = given if isinstance(given, dict) else dict(given)
        if name != "*" and given:
            blocks = {int(k): v for k, v in (given.get("block_sizes") or {}).items() if str(k) == "-1"}
            told[name] = [given.get("num_bits"), str(given.get("type")) == "dynamic", blocks.get(-1)]
    return told


def _assignment(chosen: dict[str, Any], state: dict[str, Any], known: dict[str, LayerFormat]) -> Assignment:
    layers: Assignment = {}
    for name, picked in chosen.items():
        fmt = known.get(json.dumps(_signature(picked.config), sort_keys=True), Float32())
        layers |= {layer: fmt.to_dict() for layer in state["candidate_stats"][name]["module_names"]}
    return layers


def main(arguments: list[str]) -> int:
    """The `effective-bits` verb."""
    parser = argparse.ArgumentParser(prog="effective-bits", description=__doc__)
    parser.add_argument("--net", required=True)
    parser.add_argument("--formats", required=True, help="JSON: a list of formats as dictionaries")
    parser.add_argument("--bits", required=True, help="targets, separated by commas")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    formats = [LayerFormat.from_dict(f) for f in json.loads(options.formats)]
    found = search(nets.net(options.net), formats, [float(b) for b in options.bits.split(",")])
    atomic.write_json(options.out, found)
    return 0
