"""ViT, a transformer on the patches of an image, for classification. Knows nothing about data or training.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021. Parameters have the names that weight files give them.

Shape suffixes: B batch, I channels, Y and X pixels, P patches, L = P + 1 tokens, D hidden size, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core import InputError
from ._attention import attend, split_heads
from ._counting import linear_weights, transformer_flops
from ._losses import classification_loss
from ._pretrained import PretrainedModel
from ._settings import ACTIVATIONS, ClassifierConfig


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ClassifierConfig):
    """A ViT; the defaults are those of ViT-B/16 at 224 pixels.

    Attributes:
        image_size: height and width of the images, one number or both.
        patch_size: height and width of a patch, one number or both; they divide image_size.
        num_channels: 3 for colour.
        qkv_bias: whether queries, keys and values have biases.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> ViTConfig(image_size=32, patch_size=4).num_patches
        64
    """

    model_type: ClassVar[str] = "vit"
    unused: ClassVar[frozenset[str]] = frozenset({"encoder_stride", "pooler_act", "pooler_output_size"})

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"
        )
        self.check_heads("hidden_size", "num_attention_heads")
        self.check_activation("hidden_act")
        self.check_shares("hidden_dropout_prob", "attention_probs_dropout_prob")
        self.check_positive("initializer_range", "layer_norm_eps")
        self.check_flags("qkv_bias")
        self.check_sides("image_size", "patch_size")
        if any(image % patch for image, patch in zip(self.image_sides, self.patch_sides, strict=True)):
            self.refuse("image_size", f"a multiple of patch_size={self.patch_size}")

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def patch_sides(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        (height, width), (tall, wide) = self.image_sides, self.patch_sides
        return (height // tall) * (width // wide)


class ViTEmbeddings(nn.Module):
    """An image as a class token and its patches, with their positions: [B, I, Y, X] -> [B, L, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_sides
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches + 1, size))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(config.num_channels, size, patch, stride=patch)})
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The first block's input."""
        x_BPD = self.patch_embeddings["projection"](pixel_values).flatten(2).transpose(1, 2)
        first = self.cls_token.expand(x_BPD.shape[0], -1, -1).to(x_BPD.dtype)
        return self.dropout(torch.cat([first, x_BPD], 1) + self.position_embeddings)


class ViTSelfAttention(nn.Module):
    """Every patch looks at every other: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.qkv_bias
        self.head_size = size // config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size, bias=bias)
        self.key = nn.Linear(size, size, bias=bias)
        self.value = nn.Linear(size, size, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The heads' answers, side by side."""
        q, k, v = (split_heads(part(x_BLD), self.head_size) for part in (self.query, self.key, self.value))
        return attend(q, k, v, None, dropout=self.dropout if self.training else 0.0)


class ViTLayer(nn.Module):
    """Attention and a feed-forward part, a normalisation before each."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.layernorm_before = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attention = nn.ModuleDict(
            {"attention": ViTSelfAttention(config), "output": nn.ModuleDict({"dense": nn.Linear(size, size)})}
        )
        self.layernorm_after = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, size)})
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The block's output."""
        seen = self.attention["attention"](self.layernorm_before(x_BLD))
        x_BLD = x_BLD + self.dropout(self.attention["output"]["dense"](seen))  # type: ignore[index]
        inner = self.activation(self.intermediate["dense"](self.layernorm_after(x_BLD)))
        return x_BLD + self.dropout(self.output["dense"](inner))


class ViTEncoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The last block's output."""
        for layer in self.layer:
            x_BLD = layer(x_BLD)
        return x_BLD


class ViTBody(nn.Module):
    """Embeddings, blocks and the last normalisation: [B, I, Y, X] -> [B, L, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.embeddings = ViTEmbeddings(config)
        self.encoder = ViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The last hidden states."""
        return self.layernorm(self.encoder(self.embeddings(pixel_values)))


class ViT(PretrainedModel[ViTConfig]):
    """A ViT with a linear classifier on its class token.

    Args:
        config: the architecture; weights are drawn from a normal distribution cut at two standard deviations of 0.02.

    Example:
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        ...                    image_size=16, patch_size=8, num_labels=10)
        >>> ViT(config)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    config_class = ViTConfig
    architecture = "ViTForImageClassification"
    prefix = "vit."
    heads = ("classifier",)
    other_heads = r"(vit\.)?pooler\.|(vit\.)?embeddings\.mask_token|decoder\."
    repositories: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vit-base": ("google/vit-base-patch16-224",),
        "vit-base-in21k": ("google/vit-base-patch16-224-in21k",),
        "vit-large": ("google/vit-large-patch16-224",),
    }

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTBody(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.reset_parameters()

    def init_module(self, module: nn.Module, name: str) -> None:
        """Draw the first weights of one module."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        if isinstance(module, ViTEmbeddings):
            for parameter in (module.cls_token, module.position_embeddings):
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits [B, K], or with labels a dict of "loss" and "logits".

        Args:
            pixel_values: [B, I, Y, X] of the configuration's size.
            labels: class numbers [B], or numbers [B, K]; see `classification_loss`.

        Raises:
            InputError: shapes do not fit.
        """
        wanted = (self.config.num_channels, *self.config.image_sides)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
            raise InputError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: [batch, {', '.join(map(str, wanted))}] is needed."
            )
        logits = self.classifier(self.vit(pixel_values)[:, 0])
        if labels is None:
            return logits
        return {"loss": classification_loss(logits, labels, self.config.problem_type), "logits": logits}

    def flops_per_sample(self) -> float:
        """Operations of a training step for each image; see `transformer_flops`."""
        config, length = self.config, self.config.num_patches + 1
        patch = config.patch_sides[0] * config.patch_sides[1] * config.num_channels
        patches = config.num_patches * patch * config.hidden_size
        per_token = transformer_flops(
            linear_weights(self.vit.encoder), config.num_hidden_layers, config.hidden_size, length
        )
        return length * per_token + 6.0 * (patches + self.classifier.weight.numel())
