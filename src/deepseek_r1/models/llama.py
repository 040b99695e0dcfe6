"""Llama: a decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU. Knows nothing about tokenizers.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023; Ainslie et al., "GQA", 2023. Parameters
have the names that weight files give them.

Shape suffixes: B batch, L length, D hidden size, N heads of queries, M of keys, H size of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import ConfigError, InputError
from ._attention import (
    RotaryTable,
    attend,
    check_tokens,
    packed_positions,
    rotary_frequencies,
    rotate,
    side_by_side,
    split_heads,
    which_sees_which,
)
from ._counting import linear_weights, transformer_flops
from ._losses import counted_next_tokens, next_token_loss, output_logits
from ._pretrained import PretrainedModel
from ._settings import ACTIVATIONS, ModelConfig

#: Ways of stretching rotary positions -> the numbers each needs.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A Llama; the defaults are the first one's of 7 billion parameters.

    Attributes:
        num_key_value_heads: heads of keys and values, which groups of queries share; None: as many as queries have.
        head_dim: size of a head; None: hidden_size / num_attention_heads.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or a dict with "rope_type" "linear" or "llama3" and its numbers; see `rotary_frequencies`.
        tie_word_embeddings: whether the output matrix is the table of embeddings.
        pad_token_id: the token whose embedding is never trained, or None.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_size
        16
    """

    model_type: ClassVar[str] = "llama"
    unused: ClassVar[frozenset[str]] = frozenset({"pretraining_tp", "rope_parameters"})

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        self.check_counts(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings",
        )  # fmt: skip
        if self.num_key_value_heads is not None:
            self.check_counts("num_key_value_heads")
            self.check_heads("num_attention_heads", "num_key_value_heads")
        if self.head_dim is None:
            self.check_heads("hidden_size", "num_attention_heads")
        else:
            self.check_counts("head_dim")
        if self.head_size % 2:
            raise ConfigError(
                f"LlamaConfig: the size of a head is {self.head_size}; rotary positions need an even one."
            )
        self.check_activation("hidden_act")
        self.check_shares("attention_dropout")
        self.check_flags("attention_bias", "mlp_bias", "tie_word_embeddings")
        self.check_positive("rope_theta", "rms_norm_eps", "initializer_range")
        self.check_padding()
        self._check_scaling()

    def _check_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        kind = str(scaling.get("rope_type")) if isinstance(scaling, Mapping) else ""
        if kind not in ROPE_TYPES:
            self.refuse("rope_scaling", "None or a dict whose rope_type is " + " or ".join(map(repr, ROPE_TYPES)))
        for key in ROPE_TYPES[kind]:
            if not isinstance(scaling.get(key), int | float) or scaling[key] <= 0:
                self.refuse("rope_scaling", f"a dict with a number above 0 for {', '.join(ROPE_TYPES[kind])}")

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @classmethod
    def read_hf(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Fields from a `config.json`, whose rotary keys have two forms, an older and a newer one."""
        fields = super().read_hf(data)
        scaling = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
        theta = scaling.pop("rope_theta", None)
        kind = scaling.pop("type", None)
        scaling.setdefault("rope_type", kind or "default")
        fields["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        if theta is not None:
            fields["rope_theta"] = theta
        return fields

    def to_hf(self) -> dict[str, Any]:
        """The keys of `config.json`, the rotary ones in both forms."""
        data = super().to_hf()
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        data["rope_scaling"] = scaling
        data["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta}
        data["num_key_value_heads"], data["head_dim"] = self.key_heads, self.head_size
        return data


class LlamaAttention(nn.Module):
    """Every token looks at those before it; groups of queries share keys and values: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, head, bias = config.hidden_size, config.head_size, config.attention_bias
        self.head_size, self.dropout = head, config.attention_dropout
        self.q_proj = nn.Linear(size, config.num_attention_heads * head, bias=bias)
        self.k_proj = nn.Linear(size, config.key_heads * head, bias=bias)
        self.v_proj = nn.Linear(size, config.key_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, size, bias=bias)

    def forward(self, x_BLD: Tensor, angles: tuple[Tensor, Tensor], seen: Tensor | None) -> Tensor:
        """The heads' answers, projected."""
        parts = side_by_side(x_BLD, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(part, self.head_size) for part in parts)
        q, k = rotate(q, *angles), rotate(k, *angles)
        return self.o_proj(attend(q, k, v, seen, causal=True, dropout=self.dropout if self.training else 0.0))


class LlamaMLP(nn.Module):
    """A gated feed-forward part (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Of one size."""
        gate, up = side_by_side(x_BLD, self.gate_proj, self.up_proj)
        return self.down_proj(self.activation(gate) * up)


class LlamaLayer(nn.Module):
    """Attention and a feed-forward part, a normalisation before each."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x_BLD: Tensor, angles: tuple[Tensor, Tensor], seen: Tensor | None) -> Tensor:
        """The block's output."""
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), angles, seen)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class LlamaBody(nn.Module):
    """Embeddings, blocks and the last normalisation: [B, L] -> [B, L, D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        frequencies = partial(rotary_frequencies, config.head_size, config.rope_theta, config.rope_scaling)
        self.rotary = RotaryTable(frequencies, config.max_position_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states."""
        if sequence_ids is not None and position_ids is None:
            position_ids = packed_positions(sequence_ids)
        seen = which_sees_which(attention_mask, sequence_ids, causal=True)
        angles = self.rotary(input_ids.shape[1], position_ids)
        x_BLD = self.embed_tokens(input_ids)
        for layer in self.layers:
            x_BLD = layer(x_BLD, angles, seen)
        return self.norm(x_BLD)


class Llama(PretrainedModel[LlamaConfig]):
    """Llama with its output layer: a language model.

    Args:
        config: the architecture; weights are drawn normal with standard deviation 0.02.

    Example:
        >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> model, tokens = Llama(config), torch.tensor([[2, 7, 9, 3]])
        >>> model(tokens).shape
        torch.Size([1, 4, 50])
        >>> sorted(model(tokens, labels=tokens))
        ['loss']
    """

    #: A label is compared with the output one place before it.
    shifts_labels = True
    config_class = LlamaConfig
    architecture = "LlamaForCausalLM"
    prefix = "model."
    other_heads = r"score\."
    without_content = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    repositories: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "llama-7b": ("huggyllama/llama-7b", "meta-llama/Llama-2-7b-hf"),
        "llama-2-7b": ("meta-llama/Llama-2-7b-hf",),
        "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
        "llama-3.2-1b": ("meta-llama/Llama-3.2-1B",),
        "llama-3.2-3b": ("meta-llama/Llama-3.2-3B",),
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaBody(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.reset_parameters()

    def init_module(self, module: nn.Module, name: str) -> None:
        """Draw the first weights of one module."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.RMSNorm):
            module.reset_parameters()

    def tied(self) -> Mapping[str, str]:
        """The output matrix, where it is the table of embeddings."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.lm_head is None else {}

    def get_input_embeddings(self) -> nn.Module:
        """The table of embeddings."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The module whose weight makes logits of hidden states: the output layer, or the table of embeddings."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def output_weight(self) -> Tensor:
        """The matrix [V, D] that makes logits of hidden states."""
        weight: Tensor = self.get_output_embeddings().weight  # type: ignore[assignment]
        return weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Logits [B, L, V], or with labels a dict of "loss" alone, for which the logits of all tokens never exist.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 where there is padding. Leave it out where there is none.
            position_ids: [B, L]; None: 0, 1, ...
            labels: [B, L], usually `input_ids` again: the loss of a token is that of predicting it from those before
                it. -100 does not count; give it to padding.
            sequence_ids: [B, L], numbers of the texts packed into a row, 0 for padding. A text then sees itself
                alone, its positions begin at 0, and it does not predict the next one's first token.
            token_weights: [B, L], floating, with labels: what predicting each token counts for. The loss is then the
                weighted mean. None: all count alike.

        Raises:
            InputError: shapes do not fit, or there are weights and no labels.
        """
        check_tokens(
            input_ids, self.config.max_position_embeddings, attention_mask=attention_mask,
            position_ids=position_ids, labels=labels, sequence_ids=sequence_ids, token_weights=token_weights,
        )  # fmt: skip
        x_BLD = self.model(input_ids, attention_mask, position_ids, sequence_ids)
        output = self.output_weight if self.lm_head is None else self.lm_head
        if labels is None:
            if token_weights is not None:
                raise InputError("token_weights weigh the losses of tokens; give labels too, or leave them out.")
            return output_logits(x_BLD, output)
        return {"loss": next_token_loss(x_BLD, output, labels, sequence_ids, token_weights)}

    def counted_labels(
        self, labels: Tensor, sequence_ids: Tensor | None = None, token_weights: Tensor | None = None, **_: Any
    ) -> Tensor:
        """How many labels the loss is a mean over (or the sum of their weights), a scalar: a micro-batch's weight."""
        return counted_next_tokens(labels, sequence_ids, token_weights)

    def flops_per_token(self, length: int) -> float:
        """Operations of a training step for each token of texts of this length; see `transformer_flops`."""
        config = self.config
        matrices = linear_weights(self.model) + config.vocab_size * config.hidden_size
        width = config.num_attention_heads * config.head_size
        return transformer_flops(matrices, config.num_hidden_layers, width, length)
