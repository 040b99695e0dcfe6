"""Architectures as people have them: what is found in each, and that their own code follows."""

import pytest
import torch
from torch import nn
from zoo import convnets, text

from deepseek_r1.core import Report
from deepseek_r1.pruning._structure import structure_of
from deepseek_r1.pruning._surgery import EXACT, NARROW, Trial, plan_of, settle, some_of

from .nets import half_of

PICTURE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


class Logits(nn.Module):
    """A causal language model without its cache."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, ids):
        return self.body(input_ids=ids, use_cache=False).logits


def _settled(model, example):
    report = Report("test")
    structure = settle(model.eval(), structure_of(model.eval(), example), report)
    trial, half = Trial(model, structure, jitter=False), half_of(structure, structure.groups)
    # A different share of each group, too: as its importance says.
    for removed in (some_of(structure, structure.groups), half):
        verdict = trial(removed, structure.counts)
        assert verdict.holds, verdict.reason
    return structure, plan_of(structure, half, structure.counts).apply(model)


@pytest.mark.parametrize(
    ("build", "groups"),
    [
        (convnets.resnet50, 13),
        (convnets.mobilenet_v2, 5),
        (convnets.squeezenet, 7),
        (convnets.densenet121, 10),
        (convnets.shufflenet_v2, 5),
        (convnets.vgg11, 4),
    ],
)
def test_convolutional_networks(build, groups):
    structure, _ = _settled(build(True), PICTURE)
    assert len(structure.groups) == groups
    assert set(structure.pinned.values()) == {"it is an output of the model"}


def test_efficientnet_lite():
    pytest.importorskip("efficientnet_lite_pytorch")
    structure, cut = _settled(convnets.efficientnet_lite0(True), PICTURE)
    assert len(structure.groups) == 9
    depthwise = cut._blocks[1]._depthwise_conv
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 48


def test_bert_loses_heads_and_hidden_units():
    pytest.importorskip("transformers")
    model = text.minilm_l6(True)
    structure, cut = _settled(model, (IDS, MASK))
    names = {g.name.removeprefix("body.encoder.layer.") for g in structure.groups}
    assert names == {f"{i}.{part}" for i in (0, 1) for part in ("attention.self.query", "intermediate.dense")}
    layer = cut.body.encoder.layer[0]
    assert (layer.attention.self.num_attention_heads, layer.attention.self.all_head_size) == (1, 8)
    assert layer.attention.output.dense.in_features == 8
    assert layer.output.dense.in_features == layer.intermediate.dense.out_features == 16


def test_bert_classifier_loses_its_width_too():
    pytest.importorskip("transformers")
    structure, cut = _settled(text.bert_base(True), (IDS, MASK))
    assert "body.bert.embeddings.word_embeddings" in {g.name for g in structure.groups}
    assert cut.body.bert.embeddings.LayerNorm.normalized_shape == (8,)


def test_llama_loses_grouped_heads_and_gated_units():
    pytest.importorskip("transformers")
    structure, cut = _settled(Logits(text._llama(True)), IDS)
    assert len(structure.groups) == 5
    attention, mlp = cut.body.model.layers[0].self_attn, cut.body.model.layers[0].mlp
    # One of two groups of heads: two queries with their key and value.
    assert [m.out_features for m in (attention.q_proj, attention.k_proj, attention.v_proj)] == [8, 4, 4]
    assert mlp.gate_proj.out_features == mlp.up_proj.out_features == mlp.down_proj.in_features == 16


def test_gpt2_needs_integers_changed():
    pytest.importorskip("transformers")
    structure, cut = _settled(Logits(text._gpt2(True)), IDS)
    assert {g.name.removeprefix("body.transformer.h.") for g in structure.groups} == {
        "0.attn.c_attn", "0.mlp.c_fc", "1.attn.c_attn", "1.mlp.c_fc",
    }  # fmt: skip
    attention = cut.body.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf) == (1, 8, 24)


def test_code_that_computes_in_float32_is_judged_by_what_it_can():
    pytest.importorskip("transformers")
    model = Logits(text._llama(True)).eval()
    assert EXACT < Trial(model, structure_of(model, IDS), jitter=False).allowed < NARROW
    exact = convnets.squeezenet(True).eval()
    assert Trial(exact, structure_of(exact, PICTURE), jitter=False).allowed == EXACT
