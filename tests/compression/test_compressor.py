"""`Compressor` from end to end: what it cuts, what it leaves alone, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deepseek_r1.compression import CompressionConfig, Compressor
from deepseek_r1.core import Budget, CheckFailedError, ConfigError, InputError, Int8Weight
from deepseek_r1.graph import capture
from deepseek_r1.pruning import PruneConfig
from deepseek_r1.quantization import AutoConfig


def network(alive: int = 128) -> nn.Module:
    """A classifier of whose 128 hidden units so many do something."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        net[2].weight[:, alive:] = 0
    return net.eval()


def data(net: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(64, 32, generator=generator) for _ in range(6)]
    with torch.no_grad():
        return [(x, net(x).argmax(1)) for x in inputs]


def config(tmp_path: Path, **more: object) -> CompressionConfig:
    formats = AutoConfig(engine="eager", formats=(Int8Weight(),), seconds=0.2, cache=tmp_path, calibration_batches=3)
    pruning = PruneConfig(channel_step=8, timing_rounds=0)
    return CompressionConfig(**{"formats": formats, "pruning": pruning, "levels": (0.75, 0.5), "candidates": 2, **more})


def test_units_that_do_nothing_leave_where_bits_are_not_enough(tmp_path: Path) -> None:
    net = network(alive=64)
    batches = data(net)
    compressor = Compressor(net, dataset=batches, config=config(tmp_path))
    whole = sum(p.numel() for p in net.parameters())
    # Less than a byte for each number.
    program = compressor.compress(Budget(size_mb=0.8e-6 * whole, accuracy_drop=0.02))
    assert program.parameters_bytes <= 0.8 * whole
    assert program.report.ok
    assert "chosen: cut 1" in program.report.notes
    assert program.report["units of 0"].after < 128
    assert compressor.module[0].out_features < 128
    assert net[0].out_features == 128, "the module given is left alone"
    x = batches[-1][0]
    assert (program(x).argmax(1) == net(x).argmax(1)).float().mean() > 0.95
    # What the solver predicted of the size is what came out.
    predicted = next(n for n in program.report.notes if n.startswith("cut 1 was predicted"))
    assert f"bytes {program.parameters_bytes:.4g}" in predicted


def test_quantisation_alone_is_the_result_where_a_cut_costs_more(tmp_path: Path) -> None:
    net = network()
    whole = sum(p.numel() for p in net.parameters())
    compressor = Compressor(net, dataset=data(net), config=config(tmp_path))
    program = compressor.compress(Budget(size_mb=1.2e-6 * whole))
    assert "chosen: all channels" in program.report.notes
    assert compressor.module is net
    assert program.precision == "int8"


def test_a_budget_beyond_all_names_what_there_is(tmp_path: Path) -> None:
    net = network()
    compressor = Compressor(net, dataset=data(net), config=config(tmp_path, levels=(0.5,)))
    with pytest.raises(CheckFailedError, match="keeps the budget") as caught:
        compressor.compress(Budget(size_mb=0.0005))
    assert "smallest alone" in str(caught.value)


def test_a_net_without_channels_to_cut_is_quantised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(32, 4).eval()
    program = Compressor(net, dataset=data(net), config=config(tmp_path)).compress(Budget(size_mb=0.0003))
    assert program.precision == "int8"
    assert any("pruned" in why for _, why in program.report.skipped)


def test_bad_input(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(InputError, match="AutoQuantizer"):
        Compressor(capture(net, torch.randn(2, 32)), dataset=data(net))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty"):
        Compressor(net, dataset=[])
    for wrong in ({"levels": ()}, {"levels": (1.0,)}, {"candidates": 0}, {"formats": None}):
        with pytest.raises(ConfigError):
            config(tmp_path, **wrong)
