"""AutoQuantizer: what it chooses under budgets, what it says, what it refuses, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from deepseek_r1.core import (
    Budget,
    CheckFailedError,
    ConfigError,
    Float32,
    InputError,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
    PluginError,
)
from deepseek_r1.graph import capture
from deepseek_r1.measure import Latency
from deepseek_r1.quantization import AutoConfig, AutoQuantizer, PTQConfig, _verify, quantize
from deepseek_r1.quantization import _auto as auto
from deepseek_r1.quantization._latency import LatencyTable

FORMATS = (Int8Weight(), Int4Weight(group_size=32))
#: Milliseconds of every layer by format, in place of measurements.
MS = {"float32": 4.0, "int8-weight": 2.0, "int4-weight-g32": 1.0, "int8-static": 1.5, "int8-dynamic": 1.6}


class Net(nn.Module):
    """Four layers of different weights, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 5)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.eye(64) + 0.05 * torch.randn(64, 64))
            self.layers[1].weight[:, ::16] *= 30
            self.layers[2].weight[::2] *= 0.05

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.layer_norm(layer(x), (64,))
        return self.head(x)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def batches(net: Net) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(64, 64, generator=generator) for _ in range(6)]
    with torch.no_grad():
        return [(x, net(x).argmax(1)) for x in inputs]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that no neighbour disturbs."""

    def table(shop, compiler, formats, fixed, leaves, *, seconds):
        free = [layer for layer in shop.layers if layer.name not in fixed]
        rows = {la.name: {str(f): MS[str(f)] for f in (Float32(), *formats) if not la.misfit(f)} for la in free}
        found = LatencyTable(engine=compiler.engine, base_ms=1.0, layers=rows, how="given")
        for f in (Float32(), *formats):
            found.uniform[str(f)] = found.predict(shop.uniform(f, fixed))
        return found

    def in_turns(rivals, **how):
        seconds = {"mixed": 0.001, "uniform": 0.002, "float": 0.003}
        return {name: Latency(name=name, seconds=(seconds[name],) * 20) for name in rivals}

    monkeypatch.setattr(auto, "measure_table", table)
    monkeypatch.setattr(_verify, "paired_latency", in_turns)


def config(tmp_path: Path, **more: object) -> AutoConfig:
    return AutoConfig(**{"engine": "eager", "formats": FORMATS, "seconds": 0.3, "cache": tmp_path, **more})


def formats_of(program) -> dict[str, str]:
    return {r.metric.removeprefix("layer "): r.after for r in program.report.rows if r.metric.startswith("layer ")}


def test_a_size_is_kept_and_the_worst_layer_spared(net, batches, tmp_path, timed) -> None:
    whole = sum(p.numel() * 4 for p in net.parameters())
    quantizer = AutoQuantizer(net, dataset=batches, config=config(tmp_path))
    program = quantizer.quantize(budget=Budget(size_mb=0.22 * whole / 1e6))
    assert program.parameters_bytes <= 0.22 * whole
    assert program.parent is not None
    found = formats_of(program)
    assert set(found) == {*(f"layers.{i}" for i in range(4)), "head"}
    # What the first changes goes through all others.
    assert found["layers.0"] == "int8-weight"
    assert found["layers.3"] == "int4-weight-g32"
    assert program.report["its loss"].after > program.report["loss"].after
    assert program.report.ok
    assert program.report["predicted loss"].after == pytest.approx(program.report["loss"].after, rel=3)


def test_budgets_share_what_was_found_out(net, batches, tmp_path, timed, monkeypatch) -> None:
    quantizer = AutoQuantizer(net, dataset=batches, config=config(tmp_path))
    first = quantizer.quantize(budget=Budget(size_mb=0.018))
    monkeypatch.setattr(auto, "Workshop", None)
    second = quantizer.quantize(budget=Budget(size_mb=0.014))
    assert second.parameters_bytes <= 14_000 < first.parameters_bytes <= 18_000
    curve = quantizer.pareto(along="size")
    losses, sizes = ([c.costs[m] for c in curve] for m in ("loss", "bytes"))
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)


def test_without_a_budget_little_accuracy_is_lost(net, batches, tmp_path, timed) -> None:
    program = AutoQuantizer(net, dataset=batches, config=config(tmp_path)).quantize()
    assert program.report["quality lost"].after <= 0.005
    assert any(c.name == "quality" and c.passed for c in program.report.checks)
    assert program.report["predicted latency"].after < 1 + 5 * MS["float32"]


def test_an_interrupted_search_goes_on(net, batches, tmp_path, timed, monkeypatch) -> None:
    measure = auto.Sensitivity.measure
    calls = []

    def breaks(self, formats):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(self, formats)

    monkeypatch.setattr(auto.Sensitivity, "measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        AutoQuantizer(net, dataset=batches, config=config(tmp_path)).quantize()
    estimated = auto.Sensitivity.estimate
    monkeypatch.setattr(auto.Sensitivity, "estimate", None)
    before = len(calls)
    again = AutoQuantizer(net, dataset=batches, config=config(tmp_path)).quantize()
    monkeypatch.setattr(auto.Sensitivity, "estimate", estimated)
    whole = AutoQuantizer(net, dataset=batches, config=config(tmp_path / "new")).quantize()
    assert formats_of(again) == formats_of(whole)
    assert any("found by an earlier search" in note for note in again.report.notes)
    fresh = len(calls) - before
    # The second search measured three layers less than the third.
    assert len(calls) - fresh == before
    assert fresh < 2 * (before + 20)


def test_a_damaged_file_of_findings_is_found_out_anew(net, batches, tmp_path, timed) -> None:
    settings = config(tmp_path)
    first = AutoQuantizer(net, dataset=batches, config=settings).quantize()
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["schema_version"] == 1
    file.write_text(file.read_text()[:100])
    assert formats_of(AutoQuantizer(net, dataset=batches, config=settings).quantize()) == formats_of(first)


def test_given_formats_and_skipped_layers_are_kept(net, batches, tmp_path, timed) -> None:
    settings = config(tmp_path, layers={"layers.0": Int8Static(), "head": Float32()}, ptq=PTQConfig(skip=("layers.3",)))
    program = AutoQuantizer(net, dataset=batches, config=settings).quantize(budget=Budget(latency_ms=1e4))
    assert set(formats_of(program)) == {"layers.1", "layers.2"}
    assert ("layers.3", "in the skip list") in program.report.skipped
    targets = [str(n.target) for n in program.exported.graph.nodes]
    assert sum("quantize_per_tensor" in t and "dequantize" not in t for t in targets) == 1


def test_an_impossible_budget_says_what_is_possible(net, batches, tmp_path, timed) -> None:
    quantizer = AutoQuantizer(net, dataset=batches, config=config(tmp_path))
    with pytest.raises(CheckFailedError, match="smallest alone") as caught:
        quantizer.quantize(budget=Budget(size_mb=1e-3))
    report = caught.value.report
    assert not report.ok
    assert report["smallest weights"].after * 1e6 > 1000
    assert report.plots
    assert report.facts["curve"]


def test_a_uniform_choice_that_was_measured_to_keep_the_budget_is_taken(net, batches, tmp_path, timed) -> None:
    """By prediction nothing does; but what one format for all takes is known."""
    quantizer = AutoQuantizer(net, dataset=batches, config=config(tmp_path))
    quantizer.uniform()[1].costs["ms"] = 1.2
    program = quantizer.quantize(budget=Budget(latency_ms=1.5))
    assert program.report.ok
    assert set(formats_of(program).values()) == {"int8-weight"}


def test_the_uniform_choice_wins_where_it_is_better(net, batches, tmp_path, timed, monkeypatch) -> None:
    # The solver is told that the delicate layer is the sturdy one.
    monkeypatch.setattr(
        auto, "calibrated", lambda scores, alone, together: {p: 1 / (1e-9 + s) for p, s in scores.items()}
    )
    program = AutoQuantizer(net, dataset=batches, config=config(tmp_path)).quantize(budget=Budget(size_mb=0.0185))
    assert program.parameters_bytes <= 18_500
    verdict = program.report["loss"].after
    assert verdict <= program.report["its loss"].after + 1e-9


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"minimise": "speed"}, ConfigError, "one of auto"),
        ({"formats": (Float32(),)}, ConfigError, "beside float32"),
        ({"formats": ("int8",)}, ConfigError, "no layer format"),
        ({"points": 0}, ConfigError, "at least 1"),
        ({"seconds": 0}, ConfigError, "seconds > 0"),
        ({"engine": "abacus"}, PluginError, "abacus"),
        ({"layers": {"nowhere": Int8Weight()}}, ConfigError, "no layer of the model"),
        ({"layers": {"head": Int8Weight()}, "ptq": PTQConfig(skip=("layers", "head"))}, InputError, "can be quantised"),
    ],
)
def test_wrong_settings_are_refused(net, batches, tmp_path, timed, given, error, match) -> None:
    with pytest.raises(error, match=match):
        AutoQuantizer(net, dataset=batches, config=config(tmp_path, **given)).quantize()


def test_wrong_data_are_refused(net, batches, tmp_path, timed) -> None:
    settings = config(tmp_path)
    with pytest.raises(InputError, match="empty"):
        AutoQuantizer(net, dataset=[], config=settings)
    with pytest.raises(InputError, match="calibration"):
        AutoQuantizer(capture(net, torch.randn(4, 64)), dataset=[torch.randn(4, 63)], config=settings)
    bad = torch.full((8, 64), float("nan"))
    with pytest.raises(InputError, match="not finite"):
        AutoQuantizer(net, dataset=[bad, bad], config=settings).quantize()
    with pytest.raises(ConfigError, match="mixed-precision"):
        AutoQuantizer(net, dataset=batches, config=settings).quantize(method="magic")
    with pytest.raises(ConfigError, match="memory_gb"):
        AutoQuantizer(net, dataset=batches, config=settings).quantize(budget=Budget(memory_gb=1))


def test_one_sample_is_enough_to_run_and_said_to_prove_nothing(net, tmp_path, timed) -> None:
    x = torch.randn(2, 64)
    program = AutoQuantizer(capture(net, x), dataset=[x[:1]], config=config(tmp_path)).quantize()
    assert any("proves nothing" in note for note in program.report.notes)


def test_one_batch_is_cut_in_two(net, batches, tmp_path, timed) -> None:
    program = AutoQuantizer(net, dataset=batches[:1], config=config(tmp_path)).quantize()
    assert "32 held-out samples" in program.report["quality lost"].how


def test_tied_weights_have_one_format(tmp_path, timed) -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(nn.functional.relu(self.a(x)))

    data = [torch.randn(32, 64) for _ in range(4)]
    program = AutoQuantizer(Tied(), dataset=data, config=config(tmp_path)).quantize(budget=Budget(size_mb=0.006))
    assert len(formats_of(program)) == 1
    assert program.parameters_bytes < 6000


def test_the_door_takes_its_config(net, batches, tmp_path, timed) -> None:
    program = quantize(net, dataset=batches, config=config(tmp_path))
    assert program.precision in ("int8", "mixed", "int4")


def test_measured_on_onnx_runtime(net, batches, tmp_path) -> None:
    settings = AutoConfig(formats=(Int8Static(), Int8Dynamic()), seconds=0.5, cache=tmp_path, points=4)
    program = AutoQuantizer(net, dataset=batches, config=settings).quantize(budget=Budget(size_mb=0.05))
    assert program.parameters_bytes <= 50_000
    assert "onnxruntime" in " ".join(program.report.notes)
    assert program.report["latency"].after > 0
    program.save(tmp_path / "auto.dr1")
    assert type(program).load(tmp_path / "auto.dr1").report["loss"].after == program.report["loss"].after
