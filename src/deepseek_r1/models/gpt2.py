"""GPT-2, a decoder whose output layer is its table of embeddings. Knows nothing about tokenizers or training.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. Parameters have the names that weight
files give them. The files keep matrices as [in, out]; here they are those of `nn.Linear`, [out, in].

Shape suffixes: B batch, L length, D hidden size, N heads, H size of a head, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import InputError
from ._attention import attend, check_tokens, packed_positions, split_heads, which_sees_which
from ._counting import linear_weights, transformer_flops
from ._losses import counted_next_tokens, next_token_loss, output_logits
from ._pretrained import PretrainedModel
from ._settings import ACTIVATIONS, ModelConfig

_TRANSPOSED = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """A GPT-2; the defaults are the smallest one's.

    Attributes:
        n_positions: the longest text.
        n_embd, n_layer, n_head: hidden size, blocks, heads.
        n_inner: width of the feed-forward part; None: 4 * n_embd.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout behind each block's parts, of the embeddings, of the attention.
        scale_attn_weights: whether scores are divided by the root of the size of a head.
        scale_attn_by_inverse_layer_idx: whether the n-th block's scores are divided by n, too.
        tie_word_embeddings: whether the output matrix is the table of embeddings.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> GPT2Config(n_embd=64, n_head=4).n_positions
        1024
    """

    model_type: ClassVar[str] = "gpt2"
    only: ClassVar[Mapping[str, Any]] = {"add_cross_attention": (False,)}
    unused: ClassVar[frozenset[str]] = frozenset(
        {
            "n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
            "summary_type", "summary_use_proj",
        }
    )  # fmt: skip

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self.check_counts("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        if self.n_inner is not None:
            self.check_counts("n_inner")
        self.check_heads("n_embd", "n_head")
        self.check_activation("activation_function")
        self.check_shares("resid_pdrop", "embd_pdrop", "attn_pdrop")
        self.check_flags("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
        self.check_positive("layer_norm_epsilon", "initializer_range")


class GPT2Attention(nn.Module):
    """Every token looks at those before it: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: GPT2Config, number: int) -> None:
        super().__init__()
        self.head_size = config.n_embd // config.n_head
        self.scale = 1 / math.sqrt(self.head_size) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= number + 1
        self.dropout = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BLD: Tensor, seen: Tensor | None) -> Tensor:
        """The heads' answers, projected."""
        q, k, v = (split_heads(part, self.head_size) for part in self.c_attn(x_BLD).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        return self.resid_dropout(self.c_proj(attend(q, k, v, seen, causal=True, dropout=dropout, scale=self.scale)))


class GPT2MLP(nn.Module):
    """The feed-forward part."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Of one size."""
        return self.dropout(self.c_proj(self.activation(self.c_fc(x_BLD))))


class GPT2Block(nn.Module):
    """Attention and a feed-forward part, a normalisation before each."""

    def __init__(self, config: GPT2Config, number: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, number)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x_BLD: Tensor, seen: Tensor | None) -> Tensor:
        """The block's output."""
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), seen)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class GPT2Body(nn.Module):
    """Embeddings, blocks and the last normalisation: [B, L] -> [B, L, D]."""

    position_ids: Tensor

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, number) for number in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.reset_buffers(self.wte.weight.device)

    def reset_buffers(self, device: torch.device) -> None:
        """Number the positions."""
        numbers = torch.arange(self.wpe.num_embeddings, device=device).unsqueeze(0)
        self.register_buffer("position_ids", numbers, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states."""
        if position_ids is None:
            own = self.position_ids[:, : input_ids.shape[1]]
            position_ids = own if sequence_ids is None else packed_positions(sequence_ids)
        seen = which_sees_which(attention_mask, sequence_ids, causal=True)
        x_BLD = self.drop(self.wte(input_ids) + self.wpe(position_ids))
        for block in self.h:
            x_BLD = block(x_BLD, seen)
        return self.ln_f(x_BLD)


class GPT2(PretrainedModel[GPT2Config]):
    """GPT-2 with its output layer: a language model.

    Args:
        config: the architecture. Weights are drawn as in the paper: normal with standard deviation 0.02, divided by
            the root of the number of residual parts for the matrices that end in the residual stream.

    Example:
        >>> config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        >>> model, tokens = GPT2(config), torch.tensor([[2, 7, 9, 3]])
        >>> model(tokens).shape
        torch.Size([1, 4, 50])
        >>> sorted(model(tokens, labels=tokens))
        ['loss']
    """

    #: A label is compared with the output one place before it.
    shifts_labels = True
    config_class = GPT2Config
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    other_heads = r"score\.|classifier\.|multiple_choice_head\."
    without_content = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    repositories: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "gpt2": ("openai-community/gpt2", "gpt2"),
        "gpt2-medium": ("openai-community/gpt2-medium", "gpt2-medium"),
        "gpt2-large": ("openai-community/gpt2-large", "gpt2-large"),
        "gpt2-xl": ("openai-community/gpt2-xl", "gpt2-xl"),
        "distilgpt2": ("distilbert/distilgpt2", "distilgpt2"),
    }

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Body(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()

    def init_module(self, module: nn.Module, name: str) -> None:
        """Draw the first weights of one module."""
        std = self.config.initializer_range
        if name.endswith("c_proj"):
            std /= math.sqrt(2 * self.config.n_layer)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """Matrices of the blocks are the other way round in the file."""
        return tensor.t() if _TRANSPOSED.fullmatch(name) and tensor.ndim == 2 else tensor

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        """Matrices of the blocks are the other way round in the file."""
        return self.from_file(name, tensor)

    def tied(self) -> Mapping[str, str]:
        """The output matrix, where it is the table of embeddings."""
        return {"lm_head.weight": "transformer.wte.weight"} if self.lm_head is None else {}

    def get_input_embeddings(self) -> nn.Module:
        """The table of embeddings."""
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        """The module whose weight makes logits of hidden states: the output layer, or the table of embeddings."""
        return self.transformer.wte if self.lm_head is None else self.lm_head

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
            input_ids, self.config.n_positions, attention_mask=attention_mask,
            position_ids=position_ids, labels=labels, sequence_ids=sequence_ids, token_weights=token_weights,
        )  # fmt: skip
        x_BLD = self.transformer(input_ids, attention_mask, position_ids, sequence_ids)
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
        matrices = linear_weights(self.transformer) + config.vocab_size * config.n_embd
        return transformer_flops(matrices, config.n_layer, config.n_embd, length)
