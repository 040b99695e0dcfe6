"""Adapters and stored weights beside the output layer of the reference language models, tied and not."""

import copy

import pytest
import torch
from torch import nn

from deepseek_r1.core import Hardware, InputError
from deepseek_r1.lora import LoraConfig, LoraLinear, advise_finetune, get_peft_model, quantize_base
from deepseek_r1.models import GPT2, GPT2Config, Llama, LlamaConfig
from deepseek_r1.nn import CastLinear, NF4Linear
from deepseek_r1.train import Trainer, TrainingConfig

from .conftest import disturb

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def make(kind, tied=False):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2(
            GPT2Config(vocab_size=50, n_positions=2048, n_embd=64, n_layer=2, n_head=2, tie_word_embeddings=tied)
        ).eval()
    return Llama(
        LlamaConfig(
            vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


@pytest.fixture(params=["llama", "gpt2"])
def kind(request):
    return request.param


def loss_of(model, tokens=TOKENS):
    return model(tokens, labels=tokens)["loss"]


def by_logits(model, tokens=TOKENS):
    return nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_a_model_says_which_layer_is_its_output(kind):
    own, tied = make(kind), make(kind, tied=True)
    assert own.get_output_embeddings() is own.lm_head
    assert tied.get_output_embeddings() is tied.get_input_embeddings()
    assert isinstance(tied.get_input_embeddings(), nn.Embedding)
    assert own.get_input_embeddings() is not own.get_output_embeddings()


def test_all_linear_leaves_out_the_output_layer_and_trains_the_rest(kind):
    model = get_peft_model(make(kind), LoraConfig(r=2, target_modules="all-linear"))
    assert type(model.base_model.lm_head) is nn.Linear
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    counted = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert model.get_nb_trainable_parameters()[0] == counted


@pytest.mark.parametrize("dtype", ["nf4", "int4", "bf16", "fp16"])
def test_stored_weights_leave_out_the_output_layer(kind, dtype):
    before = make(kind)
    model = quantize_base(copy.deepcopy(before), dtype)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(loss_of(model), loss_of(before), rtol=0.02, atol=0)


@pytest.mark.parametrize("samples", [500, 50_000])
def test_what_is_advised_trains(kind, samples):
    base = make(kind)
    machine = Hardware(cpu="", architecture="", isa=(), cores=2, memory_bytes=10**10, system="", gpus=())
    advice = advise_finetune(samples, machine, base, sequence_length=9)
    assert advice.base_dtype == {500: "bf16", 50_000: "nf4"}[samples]
    model = get_peft_model(base, advice.config, base_dtype=advice.base_dtype)
    data = [{"input_ids": TOKENS, "labels": TOKENS}] * 4
    trainer = Trainer(model, data, lr=1e-2, config=TrainingConfig(seed=0))
    first = float(loss_of(model).detach())
    trainer.train(epochs=3)
    assert float(loss_of(model).detach()) < first


def test_an_adapter_on_the_output_layer_counts(kind):
    base = make(kind)
    before = loss_of(base).detach()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"]))
    torch.testing.assert_close(loss_of(model), before)
    loss_of(model).backward()
    pair = model.base_model.lm_head
    assert pair.lora_B["default"].weight.grad.abs().max() > 0
    disturb(model)
    pair.zero_grad()
    loss_of(model).backward()
    got = [p.grad.clone() for p in pair.parameters() if p.requires_grad]
    pair.zero_grad()
    expected = by_logits(model)
    expected.backward()
    torch.testing.assert_close(loss_of(model), expected)
    for a, b in zip(got, [p.grad for p in pair.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(loss_of(model.merge_and_unload()), expected)


def test_an_adapter_on_the_output_layer_over_many_tokens(kind):
    model = disturb(get_peft_model(make(kind), LoraConfig(r=2, target_modules=["lm_head"])))
    tokens = torch.randint(0, 50, (2, 600), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss_of(model, tokens), by_logits(model, tokens))
    nothing = model(tokens, labels=torch.full_like(tokens, -100))["loss"]
    assert float(nothing.detach()) == 0


def test_all_linear_beside_an_adapter_on_the_output_layer(kind):
    model = get_peft_model(make(kind), LoraConfig(r=2, target_modules=["lm_head"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert isinstance(model.base_model.lm_head, LoraLinear)
    assert model.base_model.lm_head.adapters == ("default",)


@pytest.mark.parametrize(("dtype", "layer"), [("nf4", NF4Linear), ("bf16", CastLinear)])
def test_an_output_layer_of_few_bits_that_was_asked_for(kind, dtype, layer):
    model = quantize_base(make(kind), dtype, target_modules=["lm_head"])
    assert isinstance(model.lm_head, layer)
    torch.testing.assert_close(loss_of(model), by_logits(model))


def test_an_output_layer_that_is_trained_in_full(kind):
    base = make(kind)
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    before = loss_of(model).detach()
    model.base_model.lm_head.modules_to_save["default"].weight.data.mul_(3)
    assert not torch.isclose(loss_of(model), before)
    with model.disable_adapter():
        torch.testing.assert_close(loss_of(model), before)
        torch.testing.assert_close(model(TOKENS), base(TOKENS))


def test_a_label_out_of_range_is_named_with_and_without_an_adapter(kind):
    labels = TOKENS.clone()
    labels[1, 4] = 50
    plain = make(kind)
    for model in (plain, get_peft_model(plain, LoraConfig(r=2, target_modules=["lm_head"]))):
        with pytest.raises(InputError, match=r"the label 50 is out of range: labels are 0 to 49 .* -100"):
            model(TOKENS, labels=labels)


def test_a_tied_embedding_with_an_adapter_is_not_merged(kind):
    base = make(kind, tied=True)
    name = "embed_tokens" if kind == "llama" else "wte"
    model = disturb(get_peft_model(base, LoraConfig(r=2, target_modules=[name])))
    expected = model(TOKENS)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match=rf"{name} makes the model's outputs too.*tie_word_embeddings=False"):
            verb()
    torch.testing.assert_close(model(TOKENS), expected)
    model.unload()


def test_estimates_know_the_vocabulary_of_a_tied_model(kind):
    sizes = [advise_finetune(500, model=make(kind, tied)).estimate.activations_bytes for tied in (True, False)]
    assert sizes[0] == sizes[1]
