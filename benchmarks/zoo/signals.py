"""Speech, series, point clouds and tables."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ._entry import BATCH, Entry, Named


def whisper_base_encoder(small: bool) -> nn.Module:
    """Radford et al. 2022; its position table fixes the length at 30 s of sound."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
    if small:
        sizes = {
            "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
            "max_source_positions": 16,
        }  # fmt: skip
    return Named(WhisperEncoder(WhisperConfig(**sizes)), "last_hidden_state", "input_features")


def wav2vec2_base(small: bool) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    } if small else {}  # fmt: skip
    return Named(Wav2Vec2Model(Wav2Vec2Config(**sizes)), "last_hidden_state", "input_values")


class Dilated(nn.Module):
    """A residual block of causal dilated convolutions (Bai et al. 2018)."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.first = nn.Conv1d(width, width, 3, dilation=dilation)
        self.second = nn.Conv1d(width, width, 3, dilation=dilation)

    def forward(self, x_BCL: Tensor) -> Tensor:
        y_BCL = torch.relu(self.first(nn.functional.pad(x_BCL, (self.pad, 0))))
        return torch.relu(x_BCL + self.second(nn.functional.pad(y_BCL, (self.pad, 0))))


def tcn(small: bool) -> nn.Module:
    width, depth = (8, 2) if small else (128, 8)
    blocks = [Dilated(width, 2**i) for i in range(depth)]
    return nn.Sequential(nn.Conv1d(40, width, 1), *blocks, nn.Conv1d(width, 10, 1))


class PointNet(nn.Module):
    """Qi et al. 2016 with both transformer nets: a cloud of points to 40 classes."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self.turn_points, self.turn_features = Turn(3, base), Turn(base, base)
        self.first = _pointwise(3, base, base)
        self.second = _pointwise(base, base, 2 * base, 16 * base)
        self.head = nn.Sequential(*_dense(16 * base, 8 * base), *_dense(8 * base, 4 * base), nn.Linear(4 * base, 40))

    def forward(self, points_B3N: Tensor) -> Tensor:
        x = self.first(self.turn_points(points_B3N))
        x = self.second(self.turn_features(x))
        return self.head(x.amax(-1))


class Turn(nn.Module):
    """A learned k x k map of the cloud's features, near the identity."""

    def __init__(self, k: int, base: int) -> None:
        super().__init__()
        self.k = k
        self.body = _pointwise(k, base, 2 * base, 16 * base)
        self.head = nn.Sequential(*_dense(16 * base, 8 * base), *_dense(8 * base, 4 * base), nn.Linear(4 * base, k * k))

    def forward(self, x_BKN: Tensor) -> Tensor:
        turn = self.head(self.body(x_BKN).amax(-1)).unflatten(1, (self.k, self.k))
        return (turn + torch.eye(self.k, device=x_BKN.device)) @ x_BKN


def _pointwise(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[m for a, b in pairs for m in (nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU())])


def _dense(cin: int, cout: int) -> list[nn.Module]:
    return [nn.Linear(cin, cout), nn.BatchNorm1d(cout), nn.ReLU()]


def pointnet(small: bool) -> nn.Module:
    return PointNet(4 if small else 64)


class TwoTower(nn.Module):
    """Two towers whose vectors are compared, as in retrieval: the similarity of each row's pair."""

    def __init__(self, left: int, right: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.left, self.right = (_mlp(width, *[hidden] * depth, hidden // 4) for width in (left, right))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return torch.cosine_similarity(self.left(user), self.right(item), dim=-1)


def _mlp(*widths: int) -> nn.Sequential:
    pairs = list(itertools.pairwise(widths))
    layers = [m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def two_tower(small: bool) -> nn.Module:
    return TwoTower(8, 12, 16, 2) if small else TwoTower(512, 768, 2048, 3)


class DLRM(nn.Module):
    """Naumov et al. 2019: dense features, one embedding per category, their dot products, a head."""

    def __init__(self, rows: int, tables: int, width: int, bottom: int, top: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = _mlp(13, bottom, bottom // 2, width)
        pairs = (tables + 1) * tables // 2
        self.register_buffer("pairs", torch.tril_indices(tables + 1, tables + 1, -1), persistent=False)
        self.top = _mlp(pairs + width, top, top // 2, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense_BC = self.bottom(numbers)
        each = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        all_BTC = torch.stack([dense_BC, *each], 1)
        dots_BTT = all_BTC @ all_BTC.transpose(1, 2)
        flat = dots_BTT[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([dense_BC, flat], 1)))


def dlrm(small: bool) -> nn.Module:
    return DLRM(50, 4, 8, 16, 16) if small else DLRM(20000, 26, 64, 512, 1024)


def _pair(small: bool, batch: int, _: int) -> tuple[Tensor, Tensor]:
    left, right = (8, 12) if small else (512, 768)
    return torch.randn(batch, left), torch.randn(batch, right)


def _clicks(small: bool, batch: int, _: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 13), torch.randint(50 if small else 20000, (batch, 4 if small else 26))


#: Retrieval and click models answer for many rows at once: a batch of one would measure Python.
ROWS = 64
LENGTH_2 = {(0, 0): "batch", (0, 2): "length"}
PAIR = {(0, 0): "batch", (1, 0): "batch"}

ENTRIES = [
    Entry(
        name="whisper_base_encoder", field="speech", build=whisper_base_encoder, parameters=20_590_592, dynamic=BATCH,
        draw=lambda small, batch, _: torch.randn(batch, 80, 32 if small else 3000), shapes="float32 [1, 80, 3000]",
    ),
    Entry(
        name="wav2vec2_base", field="speech", build=wav2vec2_base, parameters=94_371_712, length=16000,
        small_length=400, draw=lambda _, batch, length: torch.randn(batch, length), shapes="float32 [1, 16000]",
        dynamic={(0, 0): "batch", (0, 1): "length"},
    ),
    Entry(
        name="tcn", field="speech", build=tcn, parameters=795_018, length=1000, small_length=20,
        draw=lambda _, batch, length: torch.randn(batch, 40, length), shapes="float32 [1, 40, 1000]", dynamic=LENGTH_2,
    ),
    Entry(
        name="pointnet", field="points", build=pointnet, parameters=3_480_049, length=1024, small_length=20,
        draw=lambda _, batch, length: torch.randn(batch, 3, length), shapes="float32 [1, 3, 1024]", dynamic=LENGTH_2,
    ),
    Entry(
        name="two_tower", field="table", build=two_tower, parameters=21_509_120, dynamic=PAIR,
        draw=_pair,
        shapes="float32 [64, 512] and [64, 768]", rows=ROWS,
    ),
    Entry(
        name="dlrm", field="table", build=dlrm, parameters=34_386_241, draw=_clicks, dynamic=PAIR,
        shapes="float32 [64, 13] and int64 [64, 26]", rows=ROWS,
    ),
]  # fmt: skip
