"""Text networks: encoders and decoders of transformers, a Llama-style decoder, a mixture of experts, recurrent nets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._entry import TOKENS, Build, Entry, Named, tokens

_TINY = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


class Bert(nn.Module):
    """A BERT classifier called with token numbers and their mask, as a user would."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        self.body = BertForSequenceClassification(BertConfig(num_labels=2, **sizes))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.body(input_ids=input_ids, attention_mask=attention_mask).logits


def bert_base(small: bool) -> nn.Module:
    return Bert(**(_TINY if small else {}))


def minilm_l6(small: bool) -> nn.Module:
    """The sizes of all-MiniLM-L6 (Wang et al. 2020), mean of the tokens as the sentence's vector."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return MeanPooled(BertModel(BertConfig(**(_TINY if small else sizes)), add_pooling_layer=False))


class MeanPooled(nn.Module):
    """The mean of an encoder's answers over the tokens that are no padding."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states_BLC = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights_BL1 = attention_mask.unsqueeze(-1).to(states_BLC.dtype)
        return F.normalize((states_BLC * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1e-9), dim=-1)


def distilbert(small: bool) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    sizes = {"vocab_size": 99, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if small else {}
    return Named(DistilBertModel(DistilBertConfig(**sizes)), "last_hidden_state", "input_ids", "attention_mask")


def _masked(vocabulary: int) -> Any:
    def draw(small: bool, batch: int, length: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1:, length - 1] = 0
        return tokens(vocabulary)(small, batch, length), mask

    return draw


MASKED = {(0, 0): "batch", (0, 1): "length", (1, 0): "batch", (1, 1): "length"}


def t5_small_encoder(small: bool) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2} if small else {}
    return Named(T5EncoderModel(T5Config(**sizes)), "last_hidden_state", "input_ids")


def clip_text(small: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {**_TINY, "eos_token_id": 98} if small else {}
    return Named(CLIPTextModelWithProjection(CLIPTextConfig(**sizes)), "text_embeds", "input_ids")


def _gpt2(small: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 99, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64} if small else {}
    return GPT2LMHeadModel(GPT2Config(**sizes))


class Prefill(nn.Module):
    """A causal language model over a whole prompt: the next token's logits and the cache, as plain tensors."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        answer = self.body(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        return answer.logits, [(layer.keys, layer.values) for layer in answer.past_key_values.layers]


class Decode(nn.Module):
    """One step of a causal language model: new tokens and the cache so far in, logits and the longer cache out."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (key_BHLD, value_BHLD) in enumerate(past):
            cache.update(key_BHLD, value_BHLD, number)
        answer = self.body(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return answer.logits, [(layer.keys, layer.values) for layer in answer.past_key_values.layers]


def gpt2_prefill(small: bool) -> nn.Module:
    return Prefill(_gpt2(small))


def gpt2_decode(small: bool) -> nn.Module:
    return Decode(_gpt2(small))


def _llama(small: bool) -> nn.Module:
    """RoPE, grouped-query attention, RMSNorm and SwiGLU; about 100 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 32000, "hidden_size": 640, "num_hidden_layers": 12, "num_attention_heads": 10,
        "num_key_value_heads": 2, "intermediate_size": 1792, "tie_word_embeddings": False,
    }  # fmt: skip
    few = {**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(few if small else sizes)))


def llama_prefill(small: bool) -> nn.Module:
    return Prefill(_llama(small))


def llama_decode(small: bool) -> nn.Module:
    return Decode(_llama(small))


def _step(vocabulary: int, layers: int, heads: int, width: int, small_heads: int = 2, small_width: int = 8) -> Any:
    def draw(small: bool, batch: int, length: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        depth, shape = (
            (2, (batch, small_heads, length, small_width)) if small else (layers, (batch, heads, length, width))
        )
        past = [(torch.randn(shape), torch.randn(shape)) for _ in range(depth)]
        return tokens(vocabulary)(small, batch, 1), past

    return draw


def _cached() -> dict[tuple[int, int], str]:
    """Batch of every input and length of every cached tensor, for the two layers that the small variant has."""
    return {(0, 0): "batch", **{(i, 0): "batch" for i in range(1, 5)}, **{(i, 2): "length" for i in range(1, 5)}}


class Experts(nn.Module):
    """A transformer layer with a mixture of experts: every token goes to the `top` best of them (Fedus et al. 2021).

    All experts run on all tokens and the gate weighs them, the usual form for a static graph with few experts.
    """

    def __init__(self, width: int, heads: int, hidden: int, experts: int, top: int) -> None:
        super().__init__()
        self.heads, self.top = heads, top
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = x_BLC + self._attend(self.norm1(x_BLC))
        y_BLC = self.norm2(x_BLC)
        best_BLK, chosen_BLK = self.gate(y_BLC).softmax(-1).topk(self.top, -1)
        weight_BLE = torch.zeros_like(self.gate(y_BLC)).scatter(
            -1, chosen_BLK, best_BLK / best_BLK.sum(-1, keepdim=True)
        )
        hidden_EBLH = F.gelu(torch.einsum("blc,ech->eblh", y_BLC, self.up))
        return x_BLC + torch.einsum("eblh,ehc,ble->blc", hidden_EBLH, self.down, weight_BLE)

    def _attend(self, x_BLC: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BLC).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MoE(nn.Module):
    """Embedding, layers with experts, and a head over the vocabulary."""

    def __init__(self, vocabulary: int, depth: int, width: int, heads: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*[Experts(width, heads, hidden, experts, 2) for _ in range(depth)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(ids)))


def moe(small: bool) -> nn.Module:
    return MoE(99, 2, 16, 2, 32, 4) if small else MoE(8000, 4, 384, 6, 768, 8)


class Recurrent(nn.Module):
    """Embedding, a two-layer two-way recurrent net, and scores: of the sentence, or of every token."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], vocabulary: int, width: int, labels: int, each: bool) -> None:
        super().__init__()
        self.each = each
        self.embed = nn.Embedding(vocabulary, width)
        self.body = kind(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, labels)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.body(self.embed(ids))[0]
        return self.head(states if self.each else states.mean(1))


def lstm_classifier(small: bool) -> nn.Module:
    return Recurrent(nn.LSTM, 99, 8, 2, False) if small else Recurrent(nn.LSTM, 20000, 256, 2, False)


def gru_tagger(small: bool) -> nn.Module:
    return Recurrent(nn.GRU, 99, 8, 9, True) if small else Recurrent(nn.GRU, 20000, 256, 17, True)


IDS = "int64 [1, {}]"


def _text(name: str, build: Build, vocabulary: int, length: int, parameters: int, shapes: str = IDS) -> Entry:
    return Entry(
        name=name, field="text", build=build, draw=tokens(vocabulary), shapes=shapes.format(length), dynamic=TOKENS,
        length=length, parameters=parameters,
    )  # fmt: skip


def _masked_text(name: str, build: Build, length: int, parameters: int) -> Entry:
    return Entry(
        name=name, field="text", build=build, draw=_masked(30522), shapes=f"int64 [1, {length}] and its mask",
        dynamic=MASKED, length=length, parameters=parameters,
    )  # fmt: skip


ENTRIES = [
    _masked_text("bert_base", bert_base, 128, 109_483_778),
    _masked_text("distilbert", distilbert, 128, 66_362_880),
    _masked_text("minilm_l6", minilm_l6, 128, 22_565_376),
    _text("t5_small_encoder", t5_small_encoder, 32128, 128, 35_330_816),
    _text("clip_text", clip_text, 49408, 77, 63_428_096),
    _text("gpt2_prefill", gpt2_prefill, 50257, 64, 124_439_808),
    Entry(
        name="gpt2_decode", field="text", build=gpt2_decode, draw=_step(50257, 12, 12, 64), length=128,
        shapes="int64 [1, 1] and 12 x 2 caches float32 [1, 12, 128, 64]", parameters=124_439_808, dynamic=_cached(),
    ),
    _text("llama_100m_prefill", llama_prefill, 32000, 64, 94_060_160),
    Entry(
        name="llama_100m_decode", field="text", build=llama_decode, draw=_step(32000, 12, 2, 64, 2, 4), length=128,
        shapes="int64 [1, 1] and 12 x 2 caches float32 [1, 2, 128, 64]", parameters=94_060_160, dynamic=_cached(),
    ),
    _text("moe_transformer", moe, 8000, 64, 27_410_240),
    _text("lstm_classifier", lstm_classifier, 20000, 128, 7_750_658),
    _text("gru_tagger", gru_tagger, 20000, 128, 7_100_945),
]  # fmt: skip
