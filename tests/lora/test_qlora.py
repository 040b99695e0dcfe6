"""Adapters over frozen weights of fewer bits: outputs, gradients, memory, files, and what cannot be merged."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from deepseek_r1.core import ArtifactError, ConfigError, InputError, Int4Weight
from deepseek_r1.lora import LoraConfig, LoraLinear, PeftModel, get_peft_model, load_base, quantize_base, save_base
from deepseek_r1.nn import CastLinear, NF4Linear, QuantizedLinear

from .conftest import Net, disturb

STORED = {"nf4": NF4Linear, "int4": QuantizedLinear, "bf16": CastLinear, "fp16": CastLinear}
#: Largest error of the network's outputs by their size.
ERRORS = {"nf4": 0.2, "int4": 0.2, "bf16": 0.01, "fp16": 0.002}


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return Net(64).eval()


@pytest.mark.parametrize("dtype", STORED)
def test_layers_and_outputs(wide, ids, dtype):
    expected = wide(ids)
    model = quantize_base(copy.deepcopy(wide), dtype)
    assert model.emb.weight.dtype == torch.float32
    kinds = [type(m) for m in model.modules() if isinstance(m, (nn.Linear, *STORED.values()))]
    assert kinds == [STORED[dtype]] * 7
    error = (model(ids) - expected).abs().max() / expected.abs().max()
    assert 0 < error < ERRORS[dtype]


@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", STORED)
def test_adapters_are_those_over_the_float_layers_with_the_same_values(wide, ids, dtype, method):
    config = LoraConfig(r=4, target_modules="all-linear", **method)
    model = get_peft_model(copy.deepcopy(wide), config, base_dtype=dtype)
    assert isinstance(model.base_model.head.base_layer, STORED[dtype])
    for path, module in list(model.base_model.named_modules()):
        if isinstance(module, LoraLinear):
            wide.get_submodule(path).weight.data = module.base_layer.weight.detach().float()
    plain = get_peft_model(wide, config)
    disturb(model)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" in n}, strict=False)
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-5)
    mine, theirs = (
        torch.autograd.grad(m(ids).square().sum(), [p for p in m.parameters() if p.requires_grad])
        for m in (model, plain)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_only_few_bits_live_between_the_passes(wide, ids):
    sizes = {}
    for dtype in (None, "bf16", "nf4"):
        model = get_peft_model(copy.deepcopy(wide), LoraConfig(r=2, target_modules="all-linear"), base_dtype=dtype)
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(ids)
        inner = [
            m for m in model.modules() if isinstance(m, (nn.Linear, CastLinear, NF4Linear)) and m not in _pairs(model)
        ]
        own = {t.data_ptr() for m in inner for t in (*m.parameters(), *m.buffers())}
        # A dense weight has 64 x 64 numbers; what is kept and no layer's own would be a copy of one.
        assert not [t for p, t in kept.items() if tuple(t.shape) == (64, 64) and p not in own]
        sizes[dtype] = sum(t.numel() * t.element_size() for m in inner for t in (*m.parameters(), *m.buffers()))
    table = 7 * 256 * 2 * 4
    assert sizes["bf16"] < 0.52 * sizes[None]
    assert sizes["nf4"] - table < 0.15 * sizes[None]


def _pairs(model):
    return {m for layer in model.modules() if isinstance(layer, LoraLinear) for m in
            (*layer.lora_A.values(), *layer.lora_B.values())}  # fmt: skip


def test_what_is_left_alone(wide):
    wide.get_output_embeddings = lambda: wide.head
    model = quantize_base(wide, "nf4", exclude_modules=["v_proj"])
    found = [p for p, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert found == [f"layers.{i}.q_proj" for i in range(3)]
    quantize_base(model, "nf4", target_modules=["head"])
    assert isinstance(model.head, NF4Linear)
    saved = get_peft_model(Net(64), LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]), base_dtype="nf4")
    assert type(saved.base_model.head.original_module) is nn.Linear


def test_what_cannot_be(wide):
    with pytest.raises(ConfigError, match="'nf4', 'int4'"):
        quantize_base(wide, "int3")
    with pytest.raises(
        InputError, match=r"no linear layer that \['k_proj'\] means; the layers are \['layers.0.q_proj'"
    ):
        quantize_base(wide, "nf4", target_modules=["k_proj"])
    with pytest.raises(InputError, match="0: 12 inputs do not divide into groups"):
        quantize_base(nn.Sequential(nn.Linear(12, 4)), "int4")
    wide.layers[1].q_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"layers.1.q_proj: .*not finite"):
        quantize_base(wide, "nf4")


@pytest.mark.parametrize("dtype", ["nf4", "int4"])
def test_merging_over_few_bits_is_explained(wide, ids, dtype):
    model = disturb(get_peft_model(wide, LoraConfig(r=4, target_modules=["q_proj"]), base_dtype=dtype))
    expected = model(ids)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match=r"weight of layers.0.q_proj is quantised.*dequantize=True"):
            verb()
    merged = model.merge_and_unload(dequantize=True)
    torch.testing.assert_close(merged(ids), expected, rtol=1e-4, atol=1e-5)
    assert type(merged.layers[0].q_proj) is nn.Linear
    assert isinstance(merged.layers[0].v_proj, STORED[dtype]), "without an adapter it stays as it was"


def test_merging_over_half_precision(wide, ids):
    model = disturb(get_peft_model(wide, LoraConfig(r=4, target_modules=["q_proj"]), base_dtype="bf16"))
    expected = model(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", STORED)
def test_a_base_and_its_adapter_on_disk(wide, ids, dtype, tmp_path):
    base = save_base(quantize_base(wide, dtype), tmp_path / "base.safetensors")
    model = disturb(get_peft_model(wide, LoraConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="the model has adapters"):
        save_base(wide, base)
    fresh = load_base(Net(64), base)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(again(ids), model(ids))
    with torch.device("meta"):
        bare = Net(64)
    bare = load_base(bare, base).eval()
    with model.disable_adapter():
        assert torch.equal(bare(ids), model(ids))


def test_tied_weights_stay_one(wide, tmp_path):
    wide.again = nn.Embedding(11, 64)
    wide.again.weight = wide.emb.weight
    path = save_base(quantize_base(wide, "nf4"), tmp_path / "base.safetensors")
    fresh = Net(64)
    fresh.again = nn.Embedding(11, 64)
    fresh.again.weight = fresh.emb.weight
    load_base(fresh, path)
    assert fresh.again.weight is fresh.emb.weight
    assert torch.equal(fresh.emb.weight, wide.emb.weight)


def test_bases_that_do_not_fit(wide, tmp_path):
    path = save_base(quantize_base(wide, "nf4"), tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=r"another model: emb.weight is \[11, 64\], \[11, 32\] is needed"):
        load_base(Net(32), path)
    other = Net(64)
    del other.layers[2]
    with pytest.raises(InputError, match=r"no layer layers.2"):
        load_base(other, path)
    with pytest.raises(InputError, match=r"must end in .safetensors"):
        save_base(wide, tmp_path / "base.bin")
    (tmp_path / "x.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        load_base(Net(64), tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ArtifactError, match="not written by save_base"):
        load_base(Net(64), tmp_path / "y.safetensors")
    with safe_open(path, framework="pt") as found:
        assert json.loads(found.metadata()["deepseek_r1.base"])["head"] == {"kind": "nf4"}


def test_transformers_conv1d_is_quantised_too():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    x = torch.randint(0, 50, (2, 6))
    expected = model(x).logits
    quantised = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"]), base_dtype="nf4")
    assert isinstance(model.transformer.h[0].mlp.c_fc, NF4Linear)
    assert type(model.lm_head) is nn.Linear, "it shares its weight with the embedding"
    assert (quantised(x).logits - expected).abs().max() < 0.3 * expected.abs().max()


def test_layers_of_quantize_get_adapters(wide, ids):
    layer = QuantizedLinear(64, 64, format=Int4Weight(group_size=32))
    layer.store_(torch.randint(0, 16, (64, 64)), torch.rand(64, 2) / 50, torch.full((64, 2), 8))
    wide.layers[0].q_proj = layer
    model = disturb(get_peft_model(wide, LoraConfig(r=4, target_modules=["q_proj"])))
    model(ids).sum().backward()
    assert model.base_model.layers[0].q_proj.lora_A["default"].weight.grad.abs().sum() > 0


def test_numbers_of_parameters_count_weights(wide):
    every = sum(p.numel() for p in wide.parameters())
    model = get_peft_model(wide, LoraConfig(r=4, target_modules=["q_proj"]), base_dtype="nf4")
    trained = 3 * 2 * 4 * 64
    assert model.get_nb_trainable_parameters() == (trained, every + trained)


def test_compiled_whole(wide, ids):
    model = disturb(get_peft_model(wide, LoraConfig(r=4, target_modules=["q_proj"]), base_dtype="nf4"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [None, *STORED])
def test_compiled_it_keeps_no_dense_weight(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    model = disturb(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), base_dtype=dtype)).train()
    x = torch.randn(4, 64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(called):
        saved = []
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                y = called(x)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        sizes = {t.numel() for t in saved if t.untyped_storage().data_ptr() not in own}
        return torch.autograd.grad(y.float().square().sum(), wanted), max(sizes)

    (mine, largest), (theirs, _) = gradients(compiled), gradients(model)
    assert largest < 64 * 256, "the weights have as many values"
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() < 0.05 * other.abs().max()
