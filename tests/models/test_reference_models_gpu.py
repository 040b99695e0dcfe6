"""A whole training step of the reference models as one CUDA graph, under bf16 autocast."""

from __future__ import annotations

import pytest
import torch

from deepseek_r1.models import GPT2, BERTConfig, BERTForSequenceClassification, GPT2Config, Llama, LlamaConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TEXT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}


def _case(name):
    torch.manual_seed(0)
    tokens = torch.randint(1, 512, (4, 64), device="cuda")
    if name == "bert":
        config = BERTConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return BERTForSequenceClassification(config).cuda(), tokens, torch.tensor([0, 1, 1, 0], device="cuda")
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=512, n_embd=128, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        return GPT2(config).cuda(), tokens, tokens
    return Llama(LlamaConfig(**TEXT, num_key_value_heads=2)).cuda(), tokens, tokens


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_step_is_captured_in_a_cuda_graph(name, packed):
    model, tokens, labels = _case(name)
    extra = {}
    if packed:
        extra["sequence_ids"] = torch.tensor([[1] * 30 + [2] * 30 + [0] * 4] * 4, device="cuda")
        labels = labels if name != "bert" else labels[:, None].repeat(1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = model(tokens, labels=labels, **extra)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = step().item()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert loss.isfinite()
    assert loss.item() < first
