"""Tables of latency: every layer finds its operators, and what was measured adds up again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_r1.core import Float32, Int4Weight, Int8Dynamic, Int8Static, Int8Weight
from deepseek_r1.graph import capture
from deepseek_r1.quantization import PTQConfig
from deepseek_r1.quantization._compiled import Compiler
from deepseek_r1.quantization._latency import FLOAT, LatencyTable, Neighbours, _fitted, _with_conversions, measure_table
from deepseek_r1.quantization._workshop import Workshop

FORMATS = (Int8Static(), Int8Dynamic(), Int8Weight(), Int4Weight(group_size=64))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unsqueeze(1) for f in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.third, self.head = nn.Conv2d(32, 32, 1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.second(nn.functional.relu(self.first(x))))
        return self.head((x + self.third(x)).mean((2, 3)))


def shop_of(net: nn.Module, x: torch.Tensor) -> Workshop:
    return Workshop(capture(net.eval(), x), [(x,)], PTQConfig(rounding="nearest"))


@pytest.fixture(scope="module")
def attention() -> tuple[Workshop, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 32, 64)
    return shop_of(Attention(), x), x


@pytest.fixture(scope="module")
def convolutions() -> tuple[Workshop, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    return shop_of(Convolutions(), x), x


@pytest.mark.parametrize("model", ["attention", "convolutions"])
def test_every_layer_finds_its_operators(model: str, request: pytest.FixtureRequest) -> None:
    shop, x = request.getfixturevalue(model)
    table = measure_table(shop, Compiler(shop, "onnxruntime"), FORMATS, {}, [x], seconds=1)
    assert "engine's profile" in table.how
    assert not table.refused
    assert table.base_ms > 0
    assert set(table.uniform) == {name for row in table.layers.values() for name in row}
    for layer in shop.layers:
        row = table.layers[layer.name]
        assert set(row) == {FLOAT, *(str(f) for f in FORMATS if not layer.misfit(f))}
        assert all(ms > 0 for ms in row.values())
    assert LatencyTable.from_dict(table.to_dict()) == table


def test_neighbours_are_found_behind_functions_and_additions(convolutions: tuple[Workshop, torch.Tensor]) -> None:
    shop, x = convolutions
    table = measure_table(shop, Compiler(shop, "onnxruntime"), [Int8Static()], {}, [x], seconds=0.5)
    assert {(n.first, n.second) for n in table.neighbours} == {("first", "second"), ("second", "third")}
    mixed = {**shop.uniform(Int8Static(), {}), "second": Float32()}
    pays = [n.ms(mixed[n.first], mixed[n.second]) for n in table.neighbours]
    assert all(ms > 0 for ms in pays)


def test_a_fixed_layer_is_not_asked_about(attention: tuple[Workshop, torch.Tensor]) -> None:
    shop, x = attention
    table = measure_table(
        shop, Compiler(shop, "onnxruntime"), [Int8Dynamic()], {"down": Int8Static()}, [x], seconds=0.5
    )
    assert "down" not in table.layers
    assert set(table.layers) == {layer.name for layer in shop.layers} - {"down"}
    assert table.predict(shop.uniform(Int8Dynamic(), {"down": Int8Static()})) > table.base_ms


def test_an_engine_without_a_profile_is_shared_out_by_operators(attention: tuple[Workshop, torch.Tensor]) -> None:
    shop, x = attention
    table = measure_table(shop, Compiler(shop, "eager"), [Int8Weight()], {}, [x], seconds=0.5)
    assert "PyTorch's operators" in table.how
    # Milliseconds, though only shares are known.
    shares = [row[FLOAT] for row in table.layers.values()]
    assert 0.2 < (table.base_ms + sum(shares)) / table.uniform[FLOAT] < 5


def test_what_an_engine_cannot_compile_is_refused_with_the_reason(
    attention: tuple[Workshop, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek_r1.engines._eager import EagerEngine

    build = EagerEngine.build

    def fails(self, program, folder, precision):
        if program.precision != "fp32":
            raise ValueError("no such kernel\nand more")
        build(self, program, folder, precision)

    monkeypatch.setattr(EagerEngine, "build", fails)
    shop, x = attention
    table = measure_table(shop, Compiler(shop, "eager"), [Int8Weight()], {}, [x], seconds=0.2)
    assert table.refused == {"int8-weight": "ValueError: no such kernel"}
    assert set(table.uniform) == {FLOAT}


def test_layers_are_scaled_to_the_measured_total() -> None:
    table = LatencyTable(
        engine="e", base_ms=1.0, layers={"a": {FLOAT: 2.0, "int8-static": 1.0}, "b": {FLOAT: 3.0, "int8-static": 0.5}},
        neighbours=[Neighbours(first="a", second="b", store_ms=0.1, read_ms=0.2)],
        uniform={FLOAT: 6.6, "int8-static": 3.1},
    )  # fmt: skip
    names = ("a", "b")
    choices = {FLOAT: dict.fromkeys(names, Float32()), "int8-static": dict.fromkeys(names, Int8Static())}
    fitted = _fitted(table, choices)
    assert {n: fitted.predict(choices[n]) for n in choices} == pytest.approx(table.uniform)
    assert fitted.layers["a"]["int8-static"] == pytest.approx(1.4)
    mixed = {"a": Int8Static(), "b": Float32()}
    assert fitted.predict(mixed) == pytest.approx(1.0 + 1.4 + 3.0 * 5.6 / 5 + 0.2)


def test_conversions_are_scaled_to_a_model_of_alternating_formats() -> None:
    pair = Neighbours(first="a", second="b", store_ms=0.1, read_ms=0.2)
    rows = {name: {FLOAT: 2.0, "int8-static": 1.0} for name in ("a", "b")}
    table = LatencyTable(engine="e", base_ms=1.0, layers=rows, neighbours=[pair])
    choice = {"a": Float32(), "b": Int8Static()}
    assert _with_conversions(table, choice, 4.15).neighbours[0].store_ms == pytest.approx(0.15)
    assert _with_conversions(table, choice, 4.15).predict(choice) == pytest.approx(4.15)
    # What was measured to cost nothing costs nothing, and noise does not make it cost whatever it likes.
    assert _with_conversions(table, choice, 3.0).neighbours[0].store_ms == 0.0
    assert _with_conversions(table, choice, 99.0).neighbours[0].store_ms == pytest.approx(0.2)


def test_only_a_difference_is_paid_for() -> None:
    pair = Neighbours(first="a", second="b", store_ms=2.0, read_ms=3.0)
    formats = (Float32(), Int8Static(), Int8Dynamic())
    paid = [[pair.ms(a, b) for b in formats] for a in formats]
    assert paid == [[0, 2, 0], [3, 0, 3], [0, 2, 0]]
