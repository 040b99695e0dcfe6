"""Recomputation by itself: the same gradients, the same statistics, clear refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.core import InputError
from deepseek_r1.train import Objective, checkpoint_every, checkpoint_recursively
from deepseek_r1.train.memory import measured_peak
from deepseek_r1.train.memory._intercept import Interception
from deepseek_r1.train.memory._offload import Offloader
from deepseek_r1.train.memory._region import EACH, TOGETHER, TREE, Region

from .models_for_memory import NAMES, cases, stack


def gradients(model, x, y, seed=1):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = None
    Objective(model)(model, (x,), {}, y)[0].backward()
    drawn = torch.rand(1)
    return [*(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers()), drawn]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", [1, 2, 5, "tree"])
def test_gradients_statistics_and_random_numbers_are_those_of_the_plain_model(name, way):
    torch.manual_seed(0)
    model, x, y = cases()[name]
    twin = copy.deepcopy(model)
    plain = gradients(model, x, y)
    with checkpoint_recursively(twin) if way == "tree" else checkpoint_every(twin, way):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(twin, x, y), strict=True))


@pytest.mark.parametrize("mode", [TOGETHER, EACH, TREE])
def test_every_mode_computes_the_same_and_autocast_is_kept(mode):
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()) for _ in range(9))
    x = torch.randn(4, 8, requires_grad=True)

    def run(call):
        x.grad = None
        torch.manual_seed(1)
        h = x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in layers:
                h = call(layer, h)
        h.sum().backward()
        return x.grad.clone()

    region = Region(mode)
    assert torch.equal(run(lambda layer, h: layer(h)), run(lambda layer, h: region.call(layer, (h,), {})))


def test_a_recursive_chain_holds_few_inputs():
    # The layers save nothing but their input and output, so that inputs are what counts.
    model = nn.Sequential(*(nn.Sequential(nn.Tanh(), nn.Tanh()) for _ in range(64)))
    x = torch.randn(1000, requires_grad=True)

    def step():
        x.grad = None
        model(x).sum().backward()

    plain = measured_peak(step)
    with checkpoint_every(model, 1):
        each = measured_peak(step)
    with checkpoint_recursively(model):
        recursive = measured_peak(step)
    assert plain > 120 * 4000
    assert 60 * 4000 < each < 75 * 4000
    assert recursive < 16 * 4000


def test_hooks_names_classes_and_parameters_are_untouched_and_removal_is_complete():
    model = stack()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    names, parameters = list(model.state_dict()), list(model.parameters())
    handle = checkpoint_every(model, 2)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert type(model) is nn.Sequential
    assert isinstance(model[0], nn.Linear)
    copy.deepcopy(model)(torch.randn(2, 32))
    handle.remove()
    handle.remove()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_user_hooks_and_evaluation_still_work():
    model, seen = stack(), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    with checkpoint_every(model, 3):
        with torch.no_grad():
            model(torch.randn(2, 32))
        assert seen == ["forward"]
        model(torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert seen.count("backward") == 1


def test_spectral_norm_which_changes_what_it_computes_with_gives_the_same_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()) for _ in range(3))
    )
    twin, x = copy.deepcopy(model), torch.randn(5, 6)
    plain = gradients(model, x, torch.zeros(5, 6))
    with checkpoint_every(twin, 2):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(twin, x, torch.zeros(5, 6)), strict=True))


def test_a_second_backward_pass_computes_again():
    model, x = stack(), torch.randn(8, 32)
    with checkpoint_every(model, 4):
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in model.parameters()]
        loss.backward()
    assert all(torch.equal(2 * a, p.grad) for a, p in zip(first, model.parameters(), strict=True))


def test_a_block_that_does_something_else_the_second_time_is_named():
    class Moody(nn.Module):
        calls = 0

        def forward(self, x):
            Moody.calls += 1
            return torch.tanh(x) if Moody.calls == 1 else torch.sigmoid(x[:1]).exp()

    x = torch.randn(3, requires_grad=True)
    y = Region().call(Moody(), (x,), {})
    with pytest.raises(InputError, match="second time"):
        y.sum().backward()


def test_an_input_changed_in_place_afterwards_is_named():
    x = torch.randn(3, requires_grad=True) * 1
    y = Region().call(nn.Sequential(nn.Hardtanh(), nn.Tanh()), (x,), {})
    x.mul_(2)
    with pytest.raises(InputError, match="in place"):
        y.sum().backward()


def test_a_failed_forward_pass_does_not_shift_the_next_one():
    class Fails(nn.Module):
        bad = True

        def forward(self, x):
            if self.bad:
                raise RuntimeError("out of luck")
            return torch.tanh(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Fails(), nn.Linear(4, 1))
    x = torch.randn(3, 4)
    with checkpoint_every(model, 2):
        with pytest.raises(RuntimeError, match="luck"):
            model(x)
        model[2].bad = False
        model(x).sum().backward()
    again = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(again, model.parameters(), strict=True))


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_an_interval_that_is_none_is_refused(bad):
    from deepseek_r1.core import ConfigError

    with pytest.raises(ConfigError, match="interval"):
        checkpoint_every(nn.Linear(1, 1), bad)


def test_offloaded_tensors_come_back_as_they_were():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
    x, offloader = torch.randn(8, 16), Offloader(smallest=0)

    def run(call):
        layers.zero_grad()
        h = x
        for layer in layers:
            h = call(layer, h)
        F.mse_loss(h, x).backward()
        return [p.grad.clone() for p in layers.parameters()]

    plain = run(lambda layer, h: layer(h))
    assert all(
        torch.equal(a, b) for a, b in zip(plain, run(lambda layer, h: offloader.call(layer, (h,), {})), strict=True)
    )
    offloader.settle()


@pytest.mark.filterwarnings("ignore")
def test_blocks_compiled_in_place_are_wrapped_around_their_compiled_form():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3)))
    x = torch.randn(4, 8)
    for block in model:
        block.compile(backend="aot_eager")
    plain = gradients(model, x, x)
    seen = []
    with Interception({"0": model[0]}, lambda name, run, args, kwargs: (seen.append(run), run(*args, **kwargs))[1]):
        model(x)
    assert seen[0] is model[0]._compiled_call_impl
    with checkpoint_every(model, 2):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, x, x), strict=True))
    assert model[0]._compiled_call_impl is seen[0]
