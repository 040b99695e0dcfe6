"""Trials of formats against the programs they stand for, and estimates of their cost against measured ones."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from deepseek_r1.core import BFloat16, Float32, Int4Dynamic, Int4Weight, Int8Dynamic, Int8Static, Int8Weight
from deepseek_r1.graph import capture
from deepseek_r1.quantization import PTQConfig
from deepseek_r1.quantization._sensitivity import Sensitivity, calibrated, spread
from deepseek_r1.quantization._task import Task
from deepseek_r1.quantization._workshop import Workshop

FORMATS = (BFloat16(), Int8Static(), Int8Dynamic(), Int8Weight(), Int4Weight(group_size=32), Int4Dynamic(group_size=32))


class Blocks(nn.Module):
    """Residual blocks of linear layers with very different sizes of weights, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(64, 96) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(96, 64) for _ in range(4))
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            for i, layer in enumerate(self.down):
                layer.weight *= 0.3 * 3**i
            self.up[1].weight[0] *= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down):
            x = x + down(nn.functional.relu(up(norm(x))))
        return self.head(x)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide, self.head = nn.Conv2d(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.first(x))
        x = x + self.wide(nn.functional.relu6(self.deep(x)))
        return self.head(x.mean((2, 3)))


def workshop(net: nn.Module, x: torch.Tensor) -> Workshop:
    return Workshop(capture(net.eval(), x[:8]), [(x[:16],), (x[16:32],)], PTQConfig(scaling="off"))


@pytest.fixture(scope="module")
def blocks() -> tuple[Workshop, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    return workshop(Blocks(), x), x


@pytest.fixture(scope="module")
def images() -> tuple[Workshop, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    return workshop(Images(), x), x


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("model", ["blocks", "images"])
def test_a_trial_answers_like_the_program(model: str, fmt, request: pytest.FixtureRequest) -> None:
    shop, x = request.getfixturevalue(model)
    choice = shop.uniform(fmt, {shop.layers[0].name: Float32()})
    program = shop.build(choice)
    with torch.no_grad():
        exact, built = shop.parent(x), program(x)
    tried = shop.trial.run(shop.formats(choice), (x,))[0]
    assert float((built - exact).norm()) > 0
    assert float((tried - built).norm()) <= 0.02 * float((built - exact).norm()) + 1e-4 * float(exact.norm())


def test_a_mixture_answers_like_its_program(images: tuple[Workshop, torch.Tensor]) -> None:
    shop, x = images
    choice = {"first": Int8Static(), "deep": Int8Weight(), "wide": Int8Static(), "head": BFloat16()}
    program = shop.build(choice)
    assert program.precision == "mixed"
    assert program.parent is shop.parent
    tried = shop.trial.run(shop.formats(choice), (x,))[0]
    assert torch.allclose(tried, program(x), atol=2e-3)


@pytest.mark.parametrize("model", ["blocks", "images"])
@pytest.mark.parametrize("task", [Task(1), Task(None)], ids=["classes", "values"])
def test_estimates_rank_like_measurements(model: str, task: Task, request: pytest.FixtureRequest) -> None:
    shop, x = request.getfixturevalue(model)
    sensitivity = Sensitivity(shop.trial, [(x[:32],), (x[32:],)], task)
    pairs = [(la, fmt) for la in shop.layers for fmt in FORMATS if not la.misfit(fmt)]
    estimated = sensitivity.estimate(pairs)
    measured = {pair: sensitivity.measure(dict([pair])) for pair in pairs}
    rank = spearmanr([estimated[p] for p in pairs], [measured[p] for p in pairs]).statistic
    assert rank > 0.9
    ratios = sorted(measured[p] / estimated[p] for p in pairs if measured[p] > 1e-9)
    assert 0.3 < ratios[len(ratios) // 2] < 3


def test_what_was_measured_has_its_say(blocks: tuple[Workshop, torch.Tensor]) -> None:
    shop, x = blocks
    sensitivity = Sensitivity(shop.trial, [(x,)], Task(1))
    fmt = Int4Weight(group_size=32)
    pairs = [(layer, fmt) for layer in shop.layers]
    estimated = sensitivity.estimate(pairs)
    chosen = spread(pairs, estimated, 4)
    assert len(chosen) == 4
    together = sensitivity.measure({layer: fmt for layer in shop.layers})
    found = calibrated(estimated, {p: sensitivity.measure(dict([p])) for p in chosen}, {fmt: together})
    assert sum(found.values()) == pytest.approx(together)


def test_labels_and_outputs_say_what_the_task_is() -> None:
    scores = [torch.zeros(4, 10)]
    assert Task.of(scores, torch.zeros(4, dtype=torch.long)) == Task(1, labels=True)
    assert Task.of(scores, None) == Task(1)
    assert Task.of(scores, torch.zeros(4, 10)) == Task(None)
    assert Task.of([torch.zeros(4, 7, 10)], None) == Task(None)
    assert Task.of([torch.zeros(4, 7, 10)], torch.zeros(4, 7, dtype=torch.long)) == Task(2, labels=True)


def test_divergence_and_quality_of_the_same_answers() -> None:
    out = [torch.randn(6, 5)]
    labels = out[0].argmax(1)
    for task in (Task(1, labels=True), Task(1), Task(None)):
        assert task.divergence(out, out).tolist() == pytest.approx([0.0] * 6)
        assert task.quality(out, out, labels).tolist() == [1.0] * 6
