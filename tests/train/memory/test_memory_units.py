"""Which modules are blocks."""

import pytest
import torch
from torch import nn

from deepseek_r1.train import AdamW, AdamW8bit, Lion
from deepseek_r1.train.memory import measured_peak
from deepseek_r1.train.memory._discover import MOST_UNITS, discover
from deepseek_r1.train.memory._meter import storage_bytes
from deepseek_r1.train.memory._units import find_blocks
from deepseek_r1.train.memory._workload import Workload, optimizer_bytes

from .models_for_memory import EncoderDecoder, ResNet, Transformer, Twice, Unstructured, cases, nested, stack


def test_blocks_are_the_repeated_parts_and_what_stands_beside_them():
    assert list(find_blocks(Transformer(2))) == ["embed", "blocks.0", "blocks.1", "head"]
    assert list(find_blocks(EncoderDecoder()))[:4] == ["encoder.0", "encoder.1", "encoder.2", "decoder.0"]
    assert list(find_blocks(ResNet())) == [
        "stem", "norm", "relu", "stage1.0", "stage1.1", "stage1.2", "stage2.0", "stage2.1", "stage2.2", "fc",
    ]  # fmt: skip
    assert list(find_blocks(Unstructured())) == ["first", "second", "third"]
    assert list(find_blocks(nn.Linear(2, 2))) == [""]
    assert list(find_blocks(nested()))[:3] == ["0", "1.0.0.0", "1.0.0.1"]


def found(model, x, y):
    from deepseek_r1.train import Objective

    workload = Workload(model, Objective(model), (x, y), torch.device("cpu"))
    return discover(workload, find_blocks(model))


def test_a_layer_that_works_in_place_belongs_to_the_one_before():
    torch.manual_seed(0)
    units, buffers = found(*cases()["resnet"])
    assert [c.name for c in units[1].calls] == ["norm", "relu"]
    assert buffers["norm"] == (("", "running_mean"), ("", "running_var"), ("", "num_batches_tracked"))
    assert all(u.fit for u in units)
    assert not units[-1].linked, "the mean stands between the last stage and the head"


def test_blocks_that_are_called_twice_are_two_positions():
    torch.manual_seed(0)
    units, _ = found(*cases()["twice"])
    assert [u.name for u in units[:4]] == ["blocks.0", "blocks.1", "blocks.2", "blocks.0 (call 2)"]
    # Their inputs differ only in that a gradient flows to the first one's.
    assert len({u.kind for u in units[1:6]}) == 1


def test_what_cannot_be_recomputed_says_why():
    class Box:
        pass

    class Takes(nn.Module):
        def forward(self, x, box):
            return x * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.takes, self.after = nn.Linear(4, 4), Takes(), nn.Tanh()

        def forward(self, x):
            y = self.takes(self.first(x), Box())
            z = self.after(y)
            y += 1
            return y + z

    units, _ = found(Model(), torch.randn(2, 4), torch.randn(2, 4))
    assert units[0].fit
    assert "Box" in units[1].why
    assert "in place after" in units[2].why


def test_very_long_chains_are_joined():
    units, _ = found(stack((8,) * 121), torch.randn(2, 8), torch.randn(2, 1))
    assert len(units) <= MOST_UNITS + 1
    assert sum(len(u.calls) for u in units) == 241


def test_an_optimizers_bytes_are_found_before_its_first_step():
    model = Twice()
    parameters = list(model.parameters())
    size = sum(p.nbytes for p in parameters)
    for kind, options, share in (
        (torch.optim.AdamW, {"foreach": False}, 2), (AdamW, {}, 2), (torch.optim.SGD, {}, 0),
        (torch.optim.SGD, {"momentum": 0.9}, 1),
    ):  # fmt: skip
        optimizer = kind(parameters, **options)
        state, transient = optimizer_bytes(optimizer, parameters)
        assert abs(state - share * size) <= 0.01 * size
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert optimizer_bytes(optimizer, parameters)[0] == 0 or not share
        kept = [t for s in optimizer.state.values() for t in s.values() if t is not None]
        held = [*parameters, *(p.grad for p in parameters), *kept]
        real = measured_peak(optimizer.step, held=held) - storage_bytes(held)
        assert abs(transient - real) <= 0.2 * size
    assert optimizer_bytes(torch.optim.AdamW(parameters, foreach=True), parameters)[1] > 0.9 * size


@pytest.mark.parametrize("kind", [AdamW8bit, AdamW, Lion])
@pytest.mark.parametrize("shapes", [[(1024, 768)] * 3, [(200, 300)] * 20, [(64, 64)] * 4, [(300,), (70, 70)] * 9])
def test_what_an_update_takes_is_found_for_large_models(kind, shapes):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = kind(parameters, lr=1e-3)
    _, transient = optimizer_bytes(optimizer, parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = [*parameters, *(p.grad for p in parameters)]
    held += [t for s in optimizer.state.values() for t in s.values()]
    real = measured_peak(optimizer.step, held=held) - storage_bytes(held)
    assert real * 0.95 <= transient <= 1.3 * real + 1e6
