"""The file of a Program: what comes back is what was saved, and what is damaged is refused by name."""

import io
import json
import struct
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import ArtifactError, DeepSeekError, InputError
from deepseek_r1.graph import Program, capture, rewrite, simplify
from deepseek_r1.models import DigitsNet
from deepseek_r1.quantization import quantize


class Everything(nn.Module):
    """A tied weight, buffers kept and not kept, a constant, odd names, nested inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a-b c": nn.Linear(4, 4), "über": nn.Linear(4, 4, bias=False)})
        self.layers["über"].weight = self.layers["a-b c"].weight
        self.layers["a-b c"].bias.requires_grad_(False)
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("lost", torch.randn(4), persistent=False)
        self.register_buffer("empty", torch.empty(0))

    def forward(self, x, *, more):
        y = self.layers["über"](self.layers["a-b c"](x)) + self.kept * self.lost + torch.tensor([1.0, 2, 3, 4])
        y = y + more[0] + torch.cat([self.empty, self.kept])
        return {"y": y, "deep": (None, [y.argmax(-1)], 7, True, 2.5)}


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Everything(), {"x": torch.randn(1, 4), "more": [torch.randn(1, 4), 3]}, name="everything")


@pytest.fixture(scope="module")
def quantised():
    torch.manual_seed(0)
    return quantize(DigitsNet(width=4), dataset=[torch.randn(8, 1, 8, 8)])


def test_a_program_comes_back_bit_for_bit(program, tmp_path):
    back = Program.load(program.save(tmp_path / "p.dr1"))
    assert (back.name, back.precision, back.parent) == ("everything", "fp32", None)
    for batch in (0, 1, 5):
        inputs = {"x": torch.randn(batch, 4), "more": [torch.randn(batch, 4), 3]}
        a, b = program(**inputs), back(**inputs)
        assert torch.equal(a["y"], b["y"])
        assert torch.equal(a["deep"][1][0], b["deep"][1][0])
        assert b["deep"][0] is None
        assert b["deep"][2:] == (7, True, 2.5)
    assert back.content_hash() == program.content_hash()
    assert back.report.to_dict() == program.report.to_dict()
    assert back.input_shapes() == program.input_shapes()
    assert torch.equal(back.example_inputs[1]["x"], program.example_inputs[1]["x"])
    assert back.example_inputs[1]["more"][1] == 3


def test_saving_again_gives_the_same_hash_and_a_change_another(program, tmp_path):
    first = Program.load(program.save(tmp_path / "p.dr1"))
    second = Program.load(first.save(tmp_path / "q.dr1"))
    assert second.content_hash() == program.content_hash()
    with torch.no_grad():
        second.exported.state_dict["kept"][0] += 1e-3
    assert second.content_hash() != program.content_hash()


def test_tied_weights_stay_tied_and_keep_their_flags(program, tmp_path):
    path = program.save(tmp_path / "p.dr1")
    state = Program.load(path).exported.state_dict
    assert state["layers.a-b c.weight"] is state["layers.über.weight"]
    assert isinstance(state["layers.über.weight"], nn.Parameter)
    assert not state["layers.a-b c.bias"].requires_grad
    assert not isinstance(state["kept"], nn.Parameter)
    assert "lost" not in state
    with zipfile.ZipFile(path) as archive:
        names = set(struct_names(archive.read("weights.safetensors")))
    assert len({"state:layers.a-b c.weight", "state:layers.über.weight"} & names) == 1


def struct_names(data):
    (length,) = struct.unpack("<Q", data[:8])
    return [k for k in json.loads(data[8 : 8 + length]) if k != "__metadata__"]


def test_views_of_one_storage_survive(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(4, 4)
            self.a, self.b = nn.Parameter(whole[:2]), nn.Parameter(whole.t())

        def forward(self, x):
            return x @ self.b @ self.a.t()

    program = capture(Views(), torch.randn(2, 4))
    back = Program.load(program.save(tmp_path / "p.dr1"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(back(x), program(x))


def test_a_quantised_program_brings_its_parent(quantised, tmp_path):
    back = Program.load(quantised.save(tmp_path / "q.dr1"))
    x = torch.randn(3, 1, 8, 8)
    assert (back.precision, back.parent.precision) == ("int8", "fp32")
    assert torch.equal(back(x), quantised(x))
    assert torch.equal(back.parent(x), quantised.parent(x))
    assert back.content_hash() == quantised.content_hash()
    assert back.parent.content_hash() == quantised.parent.content_hash()


def test_what_came_back_can_be_rewritten_and_quantised(tmp_path):
    torch.manual_seed(0)
    net = DigitsNet(width=4).eval()
    program = capture(net, torch.randn(2, 1, 8, 8))
    back = Program.load(program.save(tmp_path / "p.dr1"))
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(simplify(back)(x), net(x), rtol=1e-4, atol=1e-5)
    again = quantize(back, dataset=[x])
    rows = [q.report["layers in int8-static"] for q in (again, quantize(program, dataset=[x]))]
    assert rows[0].after == rows[1].after
    assert rewrite(back, lambda module: 0) is back


def test_outputs_that_cannot_be_read_back_are_not_saved(tmp_path):
    class Text(nn.Module):
        def forward(self, x):
            return x, "text"

    with pytest.raises(InputError, match="'Text' gives text"):
        capture(Text(), torch.ones(2, 2)).save(tmp_path / "p.dr1")
    assert list(tmp_path.iterdir()) == []


def rebuilt(program, path, **changes):
    """The program's file with some members replaced, added or (None) left out."""
    with zipfile.ZipFile(program.save(path)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for key, new in changes.items():
        name = key.replace("__", ".")
        parts[name] = new(parts[name]) if callable(new) else new
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            if data is not None:
                archive.writestr(name, data)
    return path


def about(**fields):
    def change(data):
        return json.dumps({**json.loads(data), **fields}).encode()

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program__json": about(schema_version=99)}, "schema version 99; this release reads up to 1"),
        ({"program__json": about(schema_version="1")}, "schema version '1'"),
        ({"program__json": about(kind="deepseek-r1 artifact")}, "does not describe a deepseek-r1 program"),
        ({"program__json": about(precision="int3")}, "misstates precision"),
        ({"program__json": about(aliases=3, tree=None)}, "misstates tree, aliases"),
        ({"program__json": about(aliases={"state:x": "state:y"})}, "damaged.*KeyError"),
        ({"program__json": about(tree="[1, 2]")}, "nested inputs is damaged"),
        ({"program__json": about(report={"schema_version": 1, "rows": 3})}, "damaged"),
        ({"program__json": about(plain_leaves=[])}, "damaged"),
        ({"program__json": b"{"}, "program.json is damaged"),
        ({"program__json": b"[]"}, "does not describe a deepseek-r1 program"),
        ({"program__json": None}, "is no Program file"),
        ({"graph__json": b"\xff"}, "the graph is damaged"),
        ({"graph__json": b"{}"}, "not one that torch.export wrote"),
        ({"graph__json": b'{"graph_module": {}}'}, "damaged or of another torch"),
        ({"graph__json": b"[" * 100_000}, "the graph is damaged"),
        ({"weights__safetensors": b""}, "damaged"),
        ({"weights__safetensors": lambda d: d[:-8]}, "damaged"),
        ({"weights__safetensors": None}, "is no Program file"),
        ({"parent__dr1": b"PK"}, r"parent\.dr1 is truncated or damaged"),
        ({"evil__so": b"x"}, "is no Program file: it holds .*evil.so"),
    ],
)
def test_files_that_were_altered_are_refused_by_name(program, tmp_path, changes, message):
    path = rebuilt(program, tmp_path / "p.dr1", **changes)
    with pytest.raises(ArtifactError, match=message) as caught:
        Program.load(path)
    assert str(path) in str(caught.value)


def test_files_that_are_something_else(program, tmp_path):
    path = tmp_path / "p.dr1"
    with pytest.raises(ArtifactError, match="does not exist"):
        Program.load(path)
    with pytest.raises(ArtifactError, match="does not exist or is no file"):
        Program.load(tmp_path)
    for content in (b"", b"hello", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            Program.load(path)


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked(program, tmp_path):
    path = tmp_path / "bomb.dr1"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("program.json", "graph.json", "weights.safetensors", "examples.safetensors"):
            archive.writestr(name, bytes(10_000_000))
    with pytest.raises(ArtifactError, match="is compressed"):
        Program.load(path)


def test_a_truncated_quantised_program_is_not_taken_for_its_parent(quantised, tmp_path):
    """The parent is an archive inside the archive, with an end of its own."""
    path = quantised.save(tmp_path / "q.dr1")
    data = path.read_bytes()
    inner = data.rindex(b"PK\x05\x06", 0, data.rindex(b"PK\x05\x06"))
    for cut in (inner + 22, inner + 60, len(data) - 22, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ArtifactError, match=r"q\.dr1 is truncated or damaged"):
            Program.load(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small program's file."""
    path = tmp_path_factory.mktemp("small") / "p.dr1"
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    return capture(net, torch.randn(2, 3)).save(path).read_bytes()


def opened(data, folder):
    """Open altered bytes: a Program, or one of our own errors."""
    path = folder / "fuzz.dr1"
    path.write_bytes(data)
    try:
        return Program.load(path)
    except DeepSeekError:
        return None


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_refused_or_do_no_harm(small, tmp_path, data):
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    opened(bytes(damaged), tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6))
@example(cut=1)
def test_truncated_files_are_refused(small, tmp_path, cut):
    assert opened(small[: cut % len(small)], tmp_path) is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_behind_a_right_checksum(small, tmp_path, data):
    """The checksum of a zip member is no hurdle for an attacker, so the parsers behind it are tried too."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(small)) as archive, zipfile.ZipFile(out, "w") as made:
        victim = data.draw(st.sampled_from(archive.namelist()))
        for name in archive.namelist():
            part = bytearray(archive.read(name))
            for _ in range(data.draw(st.integers(1, 3)) if name == victim else 0):
                part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
            made.writestr(name, bytes(part))
    opened(out.getvalue(), tmp_path)


def paths_of(value, at=()):
    """Every place in a JSON value."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_of(child, (*at, key))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_graphs_with_a_value_exchanged(small, tmp_path, data):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(small)) as archive, zipfile.ZipFile(out, "w") as made:
        for name in archive.namelist():
            part = archive.read(name)
            if name == "graph.json":
                graph = json.loads(part)
                *way, last = data.draw(st.sampled_from([p for p in paths_of(graph) if p]))
                holder = graph
                for key in way:
                    holder = holder[key]
                odd = [None, -1, 10**12, 1.5, "", "x", "os.system", [], {}, True, [[]], {"as_int": 3}, {"as_none": 1}]
                holder[last] = data.draw(st.sampled_from(odd))
                part = json.dumps(graph).encode()
            made.writestr(name, part)
    opened(out.getvalue(), tmp_path)
