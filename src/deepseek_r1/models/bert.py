"""BERT for the classification of texts. Knows nothing about tokenizers or training.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019. Parameters have
the names that weight files give them.

Shape suffixes: B batch, L length, D hidden size, N heads, H size of a head, S packed sequences in a row, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import InputError
from ._attention import attend, check_tokens, packed_positions, side_by_side, split_heads, which_sees_which
from ._counting import linear_weights, transformer_flops
from ._losses import classification_loss
from ._norms import LayerNorm
from ._pretrained import PretrainedModel
from ._settings import ACTIVATIONS, ClassifierConfig


@dataclass(frozen=True, kw_only=True)
class BERTConfig(ClassifierConfig):
    """A BERT; the defaults are bert-base-uncased.

    Attributes:
        hidden_dropout_prob: dropout behind each block's two parts, and of the embeddings.
        attention_probs_dropout_prob: dropout of the attention's weights.
        classifier_dropout: dropout before the classifier; None: as hidden_dropout_prob.
        pad_token_id: the token whose embedding is never trained, or None.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> BERTConfig(hidden_size=256, num_attention_heads=4, num_labels=3).num_labels
        3
    """

    model_type: ClassVar[str] = "bert"
    only: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": (None, "absolute"),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": (None, {}),
    }
    unused: ClassVar[frozenset[str]] = frozenset({"tie_word_embeddings"})

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size",
        )  # fmt: skip
        self.check_heads("hidden_size", "num_attention_heads")
        self.check_activation("hidden_act")
        self.check_shares("hidden_dropout_prob", "attention_probs_dropout_prob")
        if self.classifier_dropout is not None:
            self.check_shares("classifier_dropout")
        self.check_positive("initializer_range", "layer_norm_eps")
        self.check_padding()


class BERTEmbeddings(nn.Module):
    """Words, positions and segments, added and normalised: [B, L] -> [B, L, D]."""

    position_ids: Tensor

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.reset_buffers(self.word_embeddings.weight.device)

    def reset_buffers(self, device: torch.device) -> None:
        """Number the positions."""
        numbers = torch.arange(self.position_embeddings.num_embeddings, device=device).unsqueeze(0)
        self.register_buffer("position_ids", numbers, persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """The sum of the three."""
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x_BLD = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x_BLD + self.position_embeddings(position_ids)))


class BERTSelfAttention(nn.Module):
    """Every token looks at every other: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_size = size // config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x_BLD: Tensor, seen: Tensor | None) -> Tensor:
        """The heads' answers, side by side."""
        q, k, v = (split_heads(y, self.head_size) for y in side_by_side(x_BLD, self.query, self.key, self.value))
        return attend(q, k, v, seen, dropout=self.dropout if self.training else 0.0)


class BERTOutput(nn.Module):
    """A projection, added to what came in and normalised: [B, L, in], [B, L, D] -> [B, L, D]."""

    def __init__(self, config: BERTConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, y: Tensor, x_BLD: Tensor) -> Tensor:
        """The projection of `y` beside the shortcut `x`."""
        return self.LayerNorm(self.dropout(self.dense(y)) + x_BLD)


class BERTLayer(nn.Module):
    """Attention and a feed-forward part, a normalisation behind each."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": BERTSelfAttention(config), "output": BERTOutput(config, config.hidden_size)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = BERTOutput(config, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BLD: Tensor, seen: Tensor | None) -> Tensor:
        """The block's output."""
        x_BLD = self.attention["output"](self.attention["self"](x_BLD, seen), x_BLD)
        return self.output(self.activation(self.intermediate["dense"](x_BLD)), x_BLD)


class BERTEncoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BERTLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x_BLD: Tensor, seen: Tensor | None) -> Tensor:
        """The last block's output."""
        for layer in self.layer:
            x_BLD = layer(x_BLD, seen)
        return x_BLD


class BERTBody(nn.Module):
    """Embeddings, blocks, and the pooler that makes one vector of a text's first token."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.embeddings = BERTEmbeddings(config)
        self.encoder = BERTEncoder(config)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def pool(self, x: Tensor) -> Tensor:
        """[..., D] of first tokens -> [..., D]."""
        return torch.tanh(self.pooler["dense"](x))


class BERTForSequenceClassification(PretrainedModel[BERTConfig]):
    """BERT with a linear classifier on the pooled first token.

    Args:
        config: the architecture; weights are drawn as in the paper (normal, standard deviation 0.02).

    Example:
        >>> config = BERTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                     intermediate_size=32, num_labels=3)
        >>> model = BERTForSequenceClassification(config)
        >>> model(torch.tensor([[2, 7, 9, 3]])).shape
        torch.Size([1, 3])
        >>> sorted(model(torch.tensor([[2, 7, 9, 3]]), labels=torch.tensor([1])))
        ['logits', 'loss']
    """

    config_class = BERTConfig
    architecture = "BertForSequenceClassification"
    prefix = "bert."
    heads = ("classifier", "bert.pooler")
    other_heads = r"cls\.|qa_outputs\."
    without_content = r"bert\.embeddings\.position_ids"
    repositories: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "bert-base": ("google-bert/bert-base-uncased", "bert-base-uncased"),
        "bert-base-uncased": ("google-bert/bert-base-uncased", "bert-base-uncased"),
        "bert-base-cased": ("google-bert/bert-base-cased", "bert-base-cased"),
        "bert-base-chinese": ("google-bert/bert-base-chinese", "bert-base-chinese"),
        "bert-large": ("google-bert/bert-large-uncased", "bert-large-uncased"),
    }

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.bert = BERTBody(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.reset_parameters()

    def init_module(self, module: nn.Module, name: str) -> None:
        """Draw the first weights of one module."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_sequences: int | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Logits, or with labels a dict of "loss" and "logits".

        Several short texts may share a row: `sequence_ids` numbers them 1, 2, ... in each row, 0 is padding, and a
        text sees itself alone. Positions then start anew with each text, and labels are [B, S], one for each text: in
        a row with fewer texts than S the rest counts for nothing, and its logits mean nothing.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 where there is padding. Leave it out where there is none.
            token_type_ids: [B, L], the segment of each token; None: 0.
            position_ids: [B, L]; None: 0, 1, ...
            labels: class numbers [B], or numbers [B, K]; see `classification_loss`. Packed: [B, S].
            sequence_ids: [B, L] for packed texts.
            num_sequences: S, the most texts in a row, where `sequence_ids` come without labels.

        Returns:
            Logits [B, K], packed [B, S, K].

        Raises:
            InputError: shapes do not fit.
        """
        check_tokens(
            input_ids, self.config.max_position_embeddings, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, sequence_ids=sequence_ids,
        )  # fmt: skip
        if sequence_ids is not None and position_ids is None:
            position_ids = packed_positions(sequence_ids)
        x_BLD = self.bert.embeddings(input_ids, token_type_ids, position_ids)
        x_BLD = self.bert.encoder(x_BLD, which_sees_which(attention_mask, sequence_ids, causal=False))
        first, present = x_BLD[:, 0], None
        if sequence_ids is not None:
            first, present = _first_tokens(x_BLD, sequence_ids, labels, num_sequences)
        logits = self.classifier(self.dropout(self.bert.pool(first)))
        if labels is None:
            return logits
        loss = classification_loss(logits, labels, self.config.problem_type, present)
        return {"loss": loss, "logits": logits}

    def flops_per_token(self, length: int) -> float:
        """Operations of a training step for each token of texts of this length; see `transformer_flops`."""
        config = self.config
        matrices = linear_weights(self.bert.encoder)
        return transformer_flops(matrices, config.num_hidden_layers, config.hidden_size, length)


def _first_tokens(
    x_BLD: Tensor, sequence_ids: Tensor, labels: Tensor | None, count: int | None
) -> tuple[Tensor, Tensor]:
    """The first token of each packed sequence [B, S, D], and whether the row has such a sequence [B, S]."""
    if count is None:
        if labels is None or labels.ndim < 2:
            raise InputError("sequence_ids need labels [batch, sequences], or num_sequences, the most texts in a row.")
        count = labels.shape[1]
    numbers_S = torch.arange(1, count + 1, device=sequence_ids.device)
    belongs_BSL = (sequence_ids[:, None, :] == numbers_S[None, :, None]).to(torch.uint8)
    # The first of equal maxima: where each number stands first.
    first_BS = belongs_BSL.argmax(-1)
    return x_BLD.gather(1, first_BS.unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1])), belongs_BSL.amax(-1).bool()
