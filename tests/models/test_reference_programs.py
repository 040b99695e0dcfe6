"""The reference models on their way through the house: captured, with every length dynamic, and exported to ONNX."""

from __future__ import annotations

import pytest
import torch

import deepseek_r1 as dr1
from deepseek_r1.models import (
    GPT2,
    BERTConfig,
    BERTForSequenceClassification,
    GPT2Config,
    Llama,
    LlamaConfig,
    ResNet,
    ResNetConfig,
    ViT,
    ViTConfig,
)

TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
MODELS = {
    "bert": lambda: BERTForSequenceClassification(BERTConfig(**TEXT, max_position_embeddings=32)),
    "llama": lambda: Llama(LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=32)),
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=30, n_positions=32, n_embd=16, n_layer=1, n_head=4)),
    "vit": lambda: ViT(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=8,
        )
    ),
    "resnet": lambda: ResNet(ResNetConfig(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1), layer_type="basic")),
}


def _inputs(name, batch=2, length=6):
    torch.manual_seed(1)
    if name in ("vit", "resnet"):
        return torch.randn(batch, 3, 16, 16)
    inputs = {"input_ids": torch.randint(1, 30, (batch, length)), "attention_mask": torch.ones(batch, length).long()}
    inputs["attention_mask"][0, length - 2 :] = 0
    return inputs


def _call(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_captured_with_all_its_sizes(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    program = dr1.capture(model, _inputs(name))
    for batch, length in ((2, 6), (1, 9), (3, 4)):
        inputs = _inputs(name, batch, length)
        torch.testing.assert_close(_call(program, inputs), _call(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_it_is_exported_to_onnx(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    program = dr1.capture(model, _inputs(name))
    report = dr1.deploy.export(program, tmp_path / "model.onnx")
    assert report.ok
    assert report.checks


def test_a_decoder_without_a_mask_is_captured():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    program = dr1.capture(model, {"input_ids": torch.randint(0, 30, (2, 6))})
    ids = torch.randint(0, 30, (3, 5))
    torch.testing.assert_close(program(input_ids=ids), model(ids), rtol=0, atol=1e-5)
