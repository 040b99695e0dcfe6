"""`get_peft_model` and the verbs of `PeftModel`: what gets adapters, what is trained, merging, several adapters."""

import copy

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.graph import capture
from deepseek_r1.lora import LoraConfig, LoraConv, LoraEmbedding, LoraLinear, PeftModel, get_peft_model

from .conftest import Net, disturb

QV = ["q_proj", "v_proj"]
#: One of every kind of layer and method.
CONFIGS = {
    "lora": {"target_modules": QV},
    "rslora": {"target_modules": QV, "use_rslora": True},
    "dora": {"target_modules": QV, "use_dora": True},
    "others": {"target_modules": ["emb", "conv"]},
    "others with magnitudes": {"target_modules": ["emb", "conv", "q_proj"], "use_dora": True},
    "saved": {"target_modules": QV, "modules_to_save": ["head"]},
    "biases": {"target_modules": QV, "bias": "lora_only"},
}


def config(name="lora", **more):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **CONFIGS[name], **more})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_changes_nothing(net, ids, name):
    before = net(ids)
    torch.testing.assert_close(get_peft_model(net, config(name))(ids), before, rtol=1e-5, atol=1e-6)


def test_random_from_the_beginning_if_asked(net, ids):
    before = net(ids)
    model = get_peft_model(net, config(init_lora_weights=False))
    assert (model(ids) - before).abs().max() > 1e-3


def test_initial_values(net):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(4000, 16))
    layer = get_peft_model(wide, LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian")).base_model[0]
    assert float(layer.lora_A["default"].weight.detach().std()) == pytest.approx(1 / 8, rel=0.05)
    assert not layer.lora_B["default"].weight.any()
    layer = get_peft_model(net, config()).base_model.layers[0].q_proj
    assert float(layer.lora_A["default"].weight.detach().abs().max()) <= 1 / 4, "Kaiming's bound for 16 inputs"
    assert layer.lora_A["default"].weight.any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_is_unmerged(net, ids, name, dtype):
    plain = copy.deepcopy(net).to(dtype)
    model = disturb(get_peft_model(net.to(dtype), config(name)))
    model.to(dtype)
    expected = model(ids)
    assert (expected - plain(ids)).abs().max() > 1e-3
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    if name != "saved":
        assert len([n for n, t in model.state_dict().items() if not torch.equal(t, state[n])]) > 1
    model.unmerge_adapter()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()), "to the bit"
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids), expected, rtol=1e-5, atol=1e-5)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "biases"])
def test_unload_and_disable_give_the_model_as_it_was(net, ids, name):
    plain = copy.deepcopy(net)
    model = disturb(get_peft_model(net, config(name)))
    changed = model(ids)
    with model.disable_adapter():
        assert torch.equal(model(ids), plain(ids))
    assert torch.equal(model(ids), changed)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids), plain(ids))
    torch.testing.assert_close(model(ids), changed, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.unload()(ids), plain(ids))


def test_what_is_trained_is_told(net, capsys):
    model = get_peft_model(net, config("saved"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    assert len(trained) == 3 * 2 * 2 + 2
    numbers = model.print_trainable_parameters()
    assert numbers == (3 * 2 * 2 * 4 * 16 + 4 * 16 + 4, sum(p.numel() for p in model.parameters()))
    assert f"{numbers[0]:,} of {numbers[1]:,}" in capsys.readouterr().out
    assert isinstance(model.base_model.layers[0].q_proj, LoraLinear)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("lora_only", {"layers.0.q_proj.base_layer.bias"}),
     ("all", {"layers.0.q_proj.base_layer.bias", "layers.1.q_proj.bias", "conv.bias", "layers.0.norm.bias"})],
)  # fmt: skip
def test_biases(net, bias, expected):
    model = get_peft_model(net, LoraConfig(target_modules=["layers.0.q_proj"], bias=bias))
    trained = {n.removeprefix("base_model.") for n, p in model.named_parameters() if p.requires_grad}
    assert expected <= trained
    assert {n for n in trained if "bias" in n} >= expected
    assert bool({n for n in trained if n.endswith("bias")}) == (bias != "none")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"target_modules": ["q_proj"]}, 3),
        ({"target_modules": r".*\.(q|v)_proj"}, 6),
        ({"target_modules": "all-linear"}, 7),
        ({"target_modules": "ALL-LINEAR"}, 7),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, 6),
        ({"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, 4),
        ({"target_modules": QV, "exclude_modules": r".*\.0\..*"}, 4),
        ({"target_modules": QV, "layers_to_transform": 1}, 2),
        ({"target_modules": QV, "layers_to_transform": [0, 2], "layers_pattern": "layers"}, 4),
        ({}, 6),
    ],
)
def test_targets(net, wanted, found):
    model = get_peft_model(net, LoraConfig(**wanted))
    assert len([m for m in model.modules() if isinstance(m, LoraLinear)]) == found


def test_the_output_layer_of_a_language_model_is_left_out(net):
    net.get_output_embeddings = lambda: net.head
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert type(model.base_model.head) is nn.Linear


def test_tasks_save_their_heads(net):
    net.classifier, net.head = net.head, nn.Identity()
    model = get_peft_model(net, LoraConfig(target_modules=QV, task_type="SEQ_CLS"))
    assert any("classifier.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"target_modules": ["q_prjo"]}, r"matches no layer.*Did you mean 'q_proj'.*q_proj \(3\)"),
        ({"target_modules": "proj"}, r"matches no layer.*Layers that adapters fit: emb, conv, q_proj \(3\), v_proj"),
        ({"target_modules": ["norm"]}, r"layers.0.norm is a LayerNorm"),
        ({"target_modules": ["layers.0"]}, r"is a Block.*Layers in it: layers.0.q_proj"),
        ({"target_modules": QV, "exclude_modules": QV}, "exclude_modules.*leave nothing"),
        ({"target_modules": QV, "modules_to_save": ["haed"]}, "no module is called 'haed'. Did you mean 'head'"),
    ],
)
def test_targets_that_cannot_be(net, ids, wanted, words):
    before, names = net(ids), list(net.state_dict())
    with pytest.raises(InputError, match=words):
        get_peft_model(net, LoraConfig(**wanted))
    assert list(net.state_dict()) == names, "the model is as it was"
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(net(ids), before)


def test_one_name_of_several_that_matches_nothing_is_told(net):
    with pytest.warns(UserWarning, match=r"target_modules.*'k_proj' matches no layer. Did you mean 'v_proj'"):
        get_peft_model(net, LoraConfig(target_modules=["q_proj", "k_proj"]))


def test_no_names_that_are_known():
    with pytest.raises(InputError, match=r"target_modules=None.*Layers that adapters fit: 0, 2"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), LoraConfig())


def test_layers_that_are_not_called_cannot_have_adapters():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(InputError, match=r"out_proj is part of a torch.nn.MultiheadAttention"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj"]))
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert sorted(n for n, m in peft.base_model.named_modules() if isinstance(m, LoraLinear)) == ["linear1", "linear2"]


def test_models_and_layers_that_cannot_be():
    for model, words in ((nn.Linear(2, 2), "a single Linear"), ("net", "a torch.nn.Module is needed")):
        with pytest.raises(InputError, match=words):
            get_peft_model(model, LoraConfig(target_modules="all-linear"))
    grouped = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(InputError, match="1: a convolution with groups=2"):
        get_peft_model(grouped, LoraConfig(target_modules=["0", "1"]))
    assert type(grouped[0]) is nn.Linear, "nothing was changed"
    with pytest.raises(ConfigError, match="a LoraConfig is needed"):
        get_peft_model(grouped, {"r": 8})


def test_several_adapters(net, ids):
    model = get_peft_model(net, config())
    model.add_adapter("other", config("dora", r=2, target_modules=["q_proj", "head"]))
    for name, seed in (("default", 1), ("other", 2)):
        model.set_adapter(name)
        disturb(model, seed)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(name in n for n in trained)
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = model(ids)
        assert torch.equal(model(ids), outputs[name])
    assert (outputs["default"] - outputs["other"]).abs().max() > 1e-3
    model.set_adapter(["default", "other"])
    both = model(ids)
    model.merge_adapter()
    torch.testing.assert_close(model(ids), both, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="unmerge_adapter"):
        model.set_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert model.active_adapters == ("other",)
    torch.testing.assert_close(model(ids), outputs["other"])
    with pytest.raises(InputError, match=r"no adapter 'default'; there are \['other'\]"):
        model.set_adapter("default")


@pytest.mark.parametrize("name", ["default", "a.b", "", "keys", 3])
def test_names_that_are_taken_or_none(net, name):
    model = get_peft_model(net, config())
    with pytest.raises(ConfigError, match=r"already|make a name"):
        model.add_adapter(name, config())


def test_an_adapter_on_a_model_with_adapters(net):
    model = get_peft_model(net, config())
    with pytest.raises(InputError, match="add_adapter"):
        get_peft_model(model, config())
    with pytest.raises(InputError, match="only a single adapter can train them"):
        model.add_adapter("other", config(bias="all"))


def test_two_copies_of_one_module(net, ids):
    model = get_peft_model(net, config("saved"))
    model.add_adapter("other", config("saved"))
    with pytest.raises(InputError, match="head is trained in full by several"):
        model.set_adapter(["default", "other"])
    disturb(model)
    first = model(ids)
    model.set_adapter("other")
    assert (model(ids) - first).abs().max() > 1e-3


def test_it_is_like_the_model(net, ids):
    model = get_peft_model(net, config())
    assert model.head is net.head
    assert model.get_base_model() is net
    with pytest.raises(AttributeError, match="nothing"):
        model.nothing
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))
    assert not model.training
    assert model.train().base_model.layers[0].q_proj.training


def test_dropout_only_in_training(net, ids):
    model = disturb(get_peft_model(net, config(lora_dropout=0.5)))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_tied_weights_are_parted_by_merging(ids):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.emb.weight

    torch.manual_seed(0)
    net = Tied().eval()
    model = disturb(get_peft_model(net, LoraConfig(target_modules=["head"])))
    expected, table = model(ids), net.emb.weight.clone()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.emb.weight, table)


def test_a_damaged_adapter_is_not_merged(net):
    model = disturb(get_peft_model(net, config()))
    model.base_model.layers[1].v_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        model.merge_and_unload()


@pytest.mark.parametrize("name", ["lora", "dora", "others with magnitudes"])
def test_compiled_whole(net, ids, name):
    model = disturb(get_peft_model(net, config(name))).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seed = torch.randn(5, 4)
    wanted = [p for p in model.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(m(ids), wanted, seed) for m in (compiled, model))
    torch.testing.assert_close(mine, theirs)


def test_captured(net, ids):
    model = disturb(get_peft_model(net, config()))
    torch.testing.assert_close(capture(model, (ids,))(ids), model(ids), rtol=1e-5, atol=1e-6)


def test_hooks_on_the_base_layer_run(net, ids):
    model = disturb(get_peft_model(net, config()))
    expected, seen = model(ids), []
    handle = model.base_model.layers[0].q_proj.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(ids), expected)
    assert seen
    handle.remove()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_types_of_adapters(net, ids, half):
    kept = get_peft_model(copy.deepcopy(net).to(half), config("dora"))
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.float32}
    assert kept(ids).dtype == half
    same = get_peft_model(net.to(half), config("dora"), autocast_adapter_dtype=False)
    assert {p.dtype for p in same.parameters() if p.requires_grad} == {half}
    assert same(ids).dtype == half


@pytest.mark.parametrize("name", ["lora", "dora", "others", "others with magnitudes"])
def test_gradients_are_those_of_the_merged_formula(net, ids, name):
    """Against autograd through the weights that merging computes (the magnitudes' lengths count as constants)."""
    model = disturb(get_peft_model(net.double(), config(name))).double()
    wanted = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad(model(ids).square().sum(), wanted)
    layers = [m for m in model.modules() if isinstance(m, LoraLinear | LoraConv | LoraEmbedding)]
    replaced = {}
    for layer in layers:
        delta = layer.scaling["default"] * layer.delta("default")
        whole = layer.base_layer.weight + delta
        magnitude = layer.magnitude("default")
        if magnitude is not None:
            whole = whole * layer._spread(magnitude / layer.norm(whole).detach())
        path = next(n for n, m in model.base_model.named_modules() if m is layer)
        replaced[f"{path}.base_layer.weight"] = whole
    with model.disable_adapter():
        output = torch.func.functional_call(model.base_model, replaced, (ids,))
    theirs = torch.autograd.grad(output.square().sum(), wanted)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_conv_of_two_and_three_dimensions():
    for kind, shape in ((nn.Conv2d, (1, 3, 9, 9)), (nn.Conv3d, (1, 3, 5, 5, 5))):
        base = kind(3, 6, 3, stride=2, padding=1, dilation=2, padding_mode="reflect" if kind is nn.Conv2d else "zeros")
        model = disturb(get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], use_dora=True)))
        x = torch.randn(shape)
        expected = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)


def test_the_wrapper_has_the_model_s_signature(net, ids):
    import inspect

    model = get_peft_model(net, config())
    assert list(inspect.signature(model.forward).parameters) == ["ids"]
    assert isinstance(model, PeftModel)
    assert model(ids=ids).shape == (5, 4)
