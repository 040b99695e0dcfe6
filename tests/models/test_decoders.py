"""Llama and GPT-2 against transformers, packed against unpacked, compiled against eager."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.models import GPT2, GPT2Config, Llama, LlamaConfig, num_parameters

LLAMA = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 24,
}  # fmt: skip
GPT = {
    "vocab_size": 60,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
#: Name -> (ours, class of transformers, its configuration, what differs from the small one).
CASES = {
    "llama": (Llama, "LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama, tied, biases": (
        Llama, "LlamaForCausalLM", "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "pad_token_id": 0},
    ),
    "llama, one key head, long": (
        Llama, "LlamaForCausalLM", "LlamaConfig",
        {**LLAMA, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": LLAMA3},
    ),
    "llama, linear": (
        Llama, "LlamaForCausalLM", "LlamaConfig",
        {**LLAMA, "num_key_value_heads": 4, "rope_parameters": {**LLAMA3, "rope_type": "linear", "factor": 2.0}},
    ),
    "gpt2": (GPT2, "GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt2, untied, scaled": (
        GPT2, "GPT2LMHeadModel", "GPT2Config",
        {**GPT, "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": 40},
    ),
    "gpt2, unscaled": (GPT2, "GPT2LMHeadModel", "GPT2Config", {**GPT, "scale_attn_weights": False}),
}  # fmt: skip


@pytest.fixture
def pair(hf, both_ways):
    def make(case):
        ours, model, config, sizes = CASES[case]
        torch.manual_seed(0)
        theirs = getattr(hf, model)(getattr(hf, config)(**sizes))
        return theirs, *both_ways(theirs, ours)

    return make


def small(kind, **changes):
    torch.manual_seed(0)
    if kind is Llama:
        return Llama(LlamaConfig(**{**LLAMA, **changes})).eval()
    return GPT2(GPT2Config(**{**GPT, **changes})).eval()


def _tokens():
    torch.manual_seed(2)
    return torch.randint(1, 60, (3, 11))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_transformers(pair, case):
    theirs, ours, again = pair(case)
    ids = _tokens()
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[1, :3] = 0, 0  # padding to the right, and to the left
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for batch in (
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": ids, "attention_mask": mask, "position_ids": places},
        ):
            real = batch.get("attention_mask", torch.ones_like(ids)).bool()
            wanted = theirs(**batch).logits
            torch.testing.assert_close(ours(**batch)[real], wanted[real], rtol=0, atol=1e-5)
            torch.testing.assert_close(again(**batch).logits[real], wanted[real], rtol=0, atol=1e-5)
            assert ours(**batch).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(pair, same_gradients, case):
    theirs, ours, _ = pair(case)
    ids = _tokens()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    wanted = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    got = ours(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(got["loss"], wanted.loss, rtol=0, atol=1e-5)
    wanted.loss.backward()
    got["loss"].backward()
    same_gradients(ours, theirs, ours.to_file)


@pytest.mark.parametrize("kind", [Llama, GPT2])
def test_packed_texts_do_not_see_each_other(kind):
    model = small(kind)
    texts = [torch.randint(1, 60, (n,)) for n in (4, 6, 3, 5)]
    rows, ids = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    places = ((0, slice(0, 4)), (0, slice(4, 10)), (1, slice(0, 3)), (1, slice(3, 8)))
    for number, (place, text) in enumerate(zip(places, texts, strict=True)):
        rows[place], ids[place] = text, number % 2 + 1
    packed = model(rows, sequence_ids=ids)
    assert packed.isfinite().all()
    for place, text in zip(places, texts, strict=True):
        torch.testing.assert_close(packed[place], model(text[None])[0], rtol=0, atol=1e-5)
    alone = [model(t[None], labels=t[None])["loss"] * (len(t) - 1) for t in texts]
    loss = model(rows, sequence_ids=ids, labels=rows)["loss"]
    torch.testing.assert_close(loss, sum(alone) / sum(len(t) - 1 for t in texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "masked", "packed"])
@pytest.mark.parametrize("kind", [Llama, GPT2])
def test_it_compiles_into_one_graph(kind, form):
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind is GPT2 else {}
    model, ids = small(kind, **none).train(), _tokens()
    batch = {"labels": ids}
    if form == "masked":
        batch["attention_mask"] = (torch.arange(11) < 8).long().repeat(3, 1)
    if form == "packed":
        batch["sequence_ids"] = torch.tensor([[1] * 5 + [2] * 4 + [0] * 2]).repeat(3, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, **batch)["loss"]
    torch.testing.assert_close(loss, model(ids, **batch)["loss"], rtol=0, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_mask_is_made_where_none_is_needed(monkeypatch):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append((kwargs["attn_mask"], kwargs["is_causal"], kwargs["enable_gqa"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    small(Llama)(_tokens())
    small(GPT2)(_tokens())
    assert seen == [(None, True, True)] * 2 + [(None, True, False)] * 2


class _Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operator gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("kind", [Llama, GPT2])
def test_with_labels_no_logits_are_made_outside_the_loss(kind):
    model, ids = small(kind), _tokens()
    with _Sizes() as plain:
        logits = model(ids)
    with _Sizes() as sizes:
        loss = model(ids, labels=ids)["loss"]
        loss.backward()
    assert ids.numel() * 60 in plain.seen
    assert ids.numel() * 60 not in sizes.seen
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)


def test_dropout_is_there_in_training_alone():
    for kind, parts in ((Llama, ("attention_dropout",)), (GPT2, ("resid_pdrop", "embd_pdrop", "attn_pdrop"))):
        for part in parts:
            model = small(kind, **{**dict.fromkeys(parts, 0.0), part: 0.5})
            ids = _tokens()
            assert torch.equal(model(ids), model(ids))
            model.train()
            assert not torch.equal(model(ids), model(ids)), part


def test_rotary_tables_stay_exact_in_bf16():
    model = small(Llama).to(torch.bfloat16)
    assert model.model.rotary.cos.dtype == torch.float32
    assert torch.equal(model.model.rotary.cos, small(Llama).model.rotary.cos)
    assert model(_tokens()).dtype == torch.bfloat16
    assert not [n for n in model.state_dict() if "rotary" in n or "position_ids" in n]


def test_bf16_autocast_trains():
    for kind in (Llama, GPT2):
        model = small(kind).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(_tokens(), labels=_tokens())["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_first_weights():
    model = small(GPT2, n_embd=128, n_layer=8)
    block = model.transformer.h[0]
    assert abs(block.mlp.c_fc.weight.std().item() - 0.02) < 1e-3
    assert abs(block.mlp.c_proj.weight.std().item() - 0.02 / 4) < 1e-3
    assert abs(small(Llama, hidden_size=128).output_weight.std().item() - 0.02) < 1e-3


def test_names_that_adapters_look_for():
    names = {n.split(".")[-1] for n, m in small(Llama).named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    names = {n.split(".")[-1] for n, m in small(GPT2).named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == {"c_attn", "c_proj", "c_fc"}


def test_sizes_of_known_models():
    with torch.device("meta"):
        gpt2, llama = GPT2(GPT2Config()), Llama(LlamaConfig())
    assert num_parameters(gpt2) == 124_439_808
    assert num_parameters(llama) == 6_738_415_616
    assert num_parameters(llama, embeddings=False) == 6_738_415_616 - 32000 * 4096
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert llama.flops_per_token(2048) == 6 * (32 * layer + 32000 * 4096) + 12 * 32 * 4096 * 2048
    assert gpt2.flops_per_token(1024) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "even"),
        ({"hidden_size": 30}, "a multiple of num_attention_heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'linear' or 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"tie_word_embeddings": 1}, "True or False"),
        ({"rope_theta": 0}, "above 0"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**{**LLAMA, **change})


def test_a_config_of_an_older_file():
    old = {**LLAMA, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    del old["rope_scaling"]["rope_type"], old["rope_scaling"]["rope_theta"]
    config, unread = LlamaConfig.from_hf(old)
    assert (config.rope_theta, config.rope_scaling["rope_type"], unread) == (5e5, "llama3", [])
    with pytest.raises(ConfigError, match=r"num_atention_heads'.*fields: .*num_attention_heads"):
        LlamaConfig.from_hf(old, num_atention_heads=2)


def test_inputs_that_do_not_fit():
    ids = _tokens()
    with pytest.raises(InputError, match="length 33"):
        small(Llama)(ids.repeat(1, 3))
    with pytest.raises(InputError, match=r"labels of shape \(3, 10\)"):
        small(GPT2)(ids, labels=ids[:, 1:])
