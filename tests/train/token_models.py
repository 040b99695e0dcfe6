"""Small language models, batches with labels of -100, and steps on them, for tests of what losses are means over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.models import GPT2, GPT2Config, Llama, LlamaConfig
from deepseek_r1.train import Objective, train_step

VOCAB, LENGTH = 23, 8


def llama():
    return Llama(LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16))  # fmt: skip


def _gpt2():
    return GPT2(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2, embd_pdrop=0.0,
                           resid_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip


def _hf(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "causal":
        config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                          num_attention_heads=2, max_position_embeddings=16)  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    if kind == "head":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2,
                                         embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                       dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                     num_attention_heads=2, hidden_dropout_prob=0.0,
                                     attention_probs_dropout_prob=0.0)  # fmt: skip
    return transformers.BertForMaskedLM(config)


class _OwnLoss(nn.Module):
    """A user's model that computes its own loss, without a shift."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(VOCAB, 12), nn.Linear(12, VOCAB)

    def forward(self, input_ids, labels=None):
        logits = self.out(torch.tanh(self.table(input_ids)))
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)}


class _Logits(nn.Module):
    """A user's model of logits [B, V, L]."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(VOCAB, 12), nn.Linear(12, VOCAB)

    def forward(self, input_ids):
        return self.out(torch.tanh(self.table(input_ids))).transpose(1, 2)


MODELS = {
    "llama": llama,
    "gpt2": _gpt2,
    "own loss": _OwnLoss,
    "logits": _Logits,
    "hf llama": lambda: _hf("causal"),
    "hf gpt2": lambda: _hf("head"),
    "hf bert": lambda: _hf("masked"),
    "hf t5": lambda: _hf("t5"),
}


def token_batch(rows=4, seed=0, all_ignored=()):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, LENGTH), generator=g)
    labels = torch.randint(0, VOCAB, (rows, LENGTH), generator=g)
    # Two rows of little, of which one begins with labels and the other ends with them.
    labels[0, 2:] = -100
    labels[1, :-2] = -100
    labels[2, 0] = -100
    for row in all_ignored:
        labels[row] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, batches, loss=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    objective = Objective(model, loss)
    result = train_step(model, batches, optimizer, objective, **options)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, result, objective


def rows(batch, *parts):
    return [{k: v[part] for k, v in batch.items()} for part in parts]


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def equal(found, expected):
    assert found[1].loss.item() == pytest.approx(expected[1].loss.item(), rel=1e-6)
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-6, atol=1e-8)
