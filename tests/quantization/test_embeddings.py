"""Embedding tables in 4 and 8 bits, tied to a head or alone, in the program and in engines."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import ConfigError, InputError, Int4Dynamic, Int4Weight, Int8Static, Int8Weight
from deepseek_r1.engines import ENGINES
from deepseek_r1.engines.base import compile_program
from deepseek_r1.graph import Program
from deepseek_r1.ops import gather_int8, gather_uint4, pack_uint4
from deepseek_r1.quantization import PTQConfig, quantize
from deepseek_r1.quantization._groups import quantize_groups


class Language(nn.Module):
    """A language model in small: the table of tokens is the head's weight too, and positions have one of their own."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.place = nn.Embedding(200, 64), nn.Embedding(32, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 200, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


IDS = torch.randint(0, 200, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return {tied: Language(tied).eval() for tied in (True, False)}


def noise(program, net):
    with torch.no_grad():
        return float((program(IDS) - net(IDS)).norm() / net(IDS).norm())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), groups=st.integers(1, 3), symmetric=st.booleans())
def test_gathered_rows_are_those_of_the_table(seed, rows, groups, symmetric):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * 32, generator=generator)
    ids = torch.randint(0, rows, (2, 3), generator=generator)
    grouped = quantize_groups(weight, 32, symmetric=symmetric, method="mse")
    found = gather_uint4(pack_uint4(grouped.values), grouped.scales, grouped.zeros, ids)
    assert torch.equal(found, grouped.weight()[ids])
    values = torch.randint(-127, 128, (rows, 7), generator=generator).to(torch.int8)
    scales = torch.rand(rows, generator=generator)
    assert torch.equal(gather_int8(values, scales, ids), (values.float() * scales[:, None])[ids])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("fmt", "table", "most"),
    [
        (Int4Weight(), Int4Weight(), 0.25), (Int8Weight(), Int8Weight(), 0.02), (Int8Static(), Int4Weight(), 0.25),
        (Int4Dynamic(group_size=32), Int8Weight(), 0.25),
    ],
    ids=str,
)  # fmt: skip
def test_tables_in_the_program_and_in_a_file(nets, tied, fmt, table, most, tmp_path):
    net = nets[tied]
    found = quantize(net, dataset=[IDS], config=PTQConfig(format=fmt, embedding=table))
    assert 0 < noise(found, net) < most
    assert not any(what in ("embed", "place") for what, _ in found.report.skipped)
    tables = [n for n in found.exported.state_dict if n.startswith("table")]
    assert {n.split("_")[0] for n in tables} == ({"table1"} if tied else {"table0", "table1"})
    floats = [v for v in found.exported.state_dict.values() if v.dtype == torch.float32 and v.numel() >= 64 * 32]
    assert not floats, "no table is left in floats"
    for batch in (0, 1, 7):
        assert found(IDS[:1].expand(batch, 12)).shape == (batch, 12, 200)
    again = Program.load(found.save(tmp_path / "lm.dr1"))
    with torch.no_grad():
        assert torch.equal(again(IDS), found(IDS))
    assert again.precision == found.precision


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino", "inductor"])
def test_engines_gather_stored_rows(nets, engine):
    plugin = ENGINES.get(engine)()
    if reason := plugin.unavailable():
        pytest.skip(reason)
    config = PTQConfig(format=Int4Weight(), embedding=Int8Weight())
    found = quantize(nets[True], dataset=[IDS], config=config)
    (answer,) = compile_program(plugin, found)([IDS])
    with torch.no_grad():
        expected = found(IDS)
    # Some engines round activations in kernels of their own for 4-bit weights.
    assert (answer.detach() - expected).norm() < 0.02 * expected.norm()


def test_a_tied_table_is_stored_once(nets):
    found = quantize(nets[True], dataset=[IDS], config=PTQConfig(format=Int4Weight(), embedding=Int4Weight()))
    stored = sum(Int4Weight().weight_bytes(*s) for s in ((200, 64), (128, 64), (64, 128), (32, 64)))
    biases = 4 * (128 + 64 + 200)
    assert stored <= found.parameters_bytes <= stored + biases
    assert found.parameters_bytes < 0.30 * 2 * sum(p.numel() for p in nets[True].parameters()) + biases
    assert found.report["embedding embed"].after == "stored once with the layer that has the same weight"
    assert found.precision == "int4"


def test_a_table_whose_head_stays_float_stays_float(nets):
    config = PTQConfig(format=Int4Weight(), embedding=Int8Weight(), skip=("head",))
    found = quantize(nets[True], dataset=[IDS], config=config)
    assert dict(found.report.skipped)["embed"] == "its table is the weight of a layer that stays float"
    assert found.report["embedding place"].after == "int8-weight"
    assert found.precision == "mixed"


def test_tables_stay_float_if_nothing_is_said(nets):
    found = quantize(nets[True], dataset=[IDS])
    assert "embedding" in dict(found.report.skipped)["embed"]


def test_tables_that_do_not_fit(nets):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 24), nn.Linear(24, 64)

        def forward(self, ids):
            return self.out(self.embed(ids))

    config = PTQConfig(format=Int8Weight(), embedding=Int4Weight())
    found = quantize(Narrow().eval(), dataset=[torch.randint(0, 9, (3, 4))], config=config)
    assert dict(found.report.skipped)["embed"] == "its 24 inputs do not divide into groups of 64"
    broken = Narrow().eval()
    broken.embed.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="'embed' has values that are not finite"):
        quantize(broken, dataset=[torch.ones(3, 4, dtype=torch.int64)], config=PTQConfig(embedding=Int8Weight()))


@pytest.mark.parametrize("given", [4, "int4", Int8Static(), Int4Dynamic()])
def test_formats_of_tables_are_checked(given):
    with pytest.raises(ConfigError, match=r"Int8Weight\(\) or Int4Weight\(\) is needed"):
        PTQConfig(embedding=given)
