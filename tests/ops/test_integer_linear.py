"""Integer linear layers: every path of the kernels against the neutral form in float64, and against each other."""

import shutil
import threading

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_r1 import ops
from deepseek_r1.core import InputError
from deepseek_r1.ops import _integer_linear, _native
from deepseek_r1.ops._integer_linear import apply_function, unpack
from deepseek_r1.ops._library import machine_of

_q = torch.ops.quantized_decomposed
GROUPS = (0, 32, 64, 128)


@pytest.fixture(scope="session", autouse=True)
def kernels(compiler):
    """Compiled before anything is timed out; without a compiler there is nothing to test here."""
    assert ops.native_problem() == ""


def has(isa):
    x, packed = torch.zeros(1, 32), ops.pack_int8(torch.zeros(1, 32, dtype=torch.int8), torch.ones(1))
    try:
        ops.integer_linear(x, packed, torch.zeros(1), isa=isa)
    except InputError:
        return False
    return True


@pytest.fixture(params=[isa for isa in ops.ISAS if isa != "any"])
def isa(request):
    if not has(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def layer(out, inputs, group, seed=0):
    """Stored weights, what they stand for in float64, and their packed form."""
    generator = torch.Generator().manual_seed(seed)
    if not group:
        values = torch.randint(-127, 128, (out, inputs), dtype=torch.int8, generator=generator)
        scales = torch.rand(out, generator=generator) * 0.01 + 1e-3
        return values.double() * scales.double()[:, None], ops.pack_int8(values, scales)
    values = torch.randint(0, 16, (out, inputs), dtype=torch.uint8, generator=generator)
    scales = torch.rand(out, inputs // group, generator=generator) * 0.1 + 0.01
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.int8, generator=generator)
    return real(values, scales, zeros, group), ops.pack_int4(values, scales, zeros)


def real(values, scales, zeros, group):
    out, inputs = values.shape
    steps = values.reshape(out, -1, group).double() - zeros.double()[:, :, None]
    return (steps * scales.double()[:, :, None]).reshape(out, inputs)


def neutral(x, weight, bias):
    """What the neutral graph says, in float64, and how large a rounding error in float32 may be."""
    scale, zero = _q.choose_qparams_per_token_asymmetric(x, torch.int8)
    stored = _q.quantize_per_token(x, scale, zero, -128, 127, torch.int8).double()
    exact = (stored - zero) * scale @ weight.T + bias.double()
    # Sums are taken over stored + 128; what the shift adds is taken off at the end.
    size = (stored + 128 + (zero + 128)) * scale @ weight.abs().T + bias.double().abs()
    return exact, size * 2.0**-21


def activations(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(*shape[:-1], 1, generator=generator)
    return torch.randn(*shape, generator=generator) * rows * 3 + rows - 0.5


def check(x, weight, packed, bias, group, isa):
    found = ops.integer_linear(x, packed, bias, group_size=group, isa=isa)
    exact, allowed = neutral(x, weight, bias)
    assert found.shape == exact.shape
    assert bool(((found - exact).abs() <= allowed).all())
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("inputs", "out"), [(128, 32), (640, 33), (1152, 100)])
def test_all_numbers_of_rows(isa, group, inputs, out):
    weight, packed = layer(out, inputs, group)
    bias = torch.linspace(-1, 1, out)
    x = activations(400, inputs)
    for rows in (*range(18), 191, 192, 193, 400):
        check(x[:rows], weight, packed, bias, group, isa)


@pytest.mark.parametrize("group", GROUPS)
def test_paths_give_the_same_bits_for_each_row_in_any_company(group):
    _, packed = layer(70, 256, group)
    x, bias = activations(29, 256), torch.zeros(70)
    whole = ops.integer_linear(x, packed, bias, group_size=group)
    for path in (p for p in ops.ISAS if has(p)):
        found = torch.cat(
            [
                ops.integer_linear(x[a:b], packed, bias, group_size=group, isa=path)
                for a, b in ((0, 1), (1, 3), (3, 6), (6, 11), (11, 29))
            ]
        )
        assert torch.equal(found, whole), path


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_layer_on_any_path(data):
    group = data.draw(st.sampled_from(GROUPS))
    inputs = data.draw(st.integers(1, 300)) if not group else group * data.draw(st.integers(1, 9))
    out, rows = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 20))
    seed = data.draw(st.integers(0, 2**31))
    weight, packed = layer(out, inputs, group, seed)
    path = data.draw(st.sampled_from([p for p in ops.ISAS if has(p)]))
    check(activations(rows, inputs, seed=seed), weight, packed, torch.randn(out), group, path)
    assert torch.equal(unpack(packed, out, inputs, group), weight.float())


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_extremes_do_not_saturate(data):
    group = data.draw(st.sampled_from(GROUPS))
    inputs, out = 256, 32
    pick = st.sampled_from
    if group:
        values = torch.full((out, inputs), data.draw(pick([0, 15])), dtype=torch.uint8)
        zeros = torch.full((out, inputs // group), data.draw(pick([0, 15])), dtype=torch.int8)
        scales = torch.full(zeros.shape, 0.5)
        weight, packed = real(values, scales, zeros, group), ops.pack_int4(values, scales, zeros)
    else:
        values = torch.full((out, inputs), data.draw(pick([-127, 127])), dtype=torch.int8)
        weight, packed = values.double(), ops.pack_int8(values, torch.ones(out))
    x = torch.full((7, inputs), data.draw(pick([-1.0, 1.0, 0.0, 1e-30, 1e30])))
    x[:, :: data.draw(st.integers(2, 9))] *= -1.0
    for path in (p for p in ops.ISAS if has(p)):
        check(x, weight, packed, torch.zeros(out), group, path)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70), st.floats(0.25, 4, width=32))
@settings(max_examples=100, deadline=None)
def test_rows_are_stored_as_torch_stores_them(numbers, steps):
    """Bit by bit: weights of one 1 each read the stored numbers back. Many of them lie halfway between two steps."""
    row = torch.tensor([*numbers, *[n + 0.5 for n in range(-20, 20)]]) * steps
    values = torch.eye(len(row), dtype=torch.int8)
    packed = ops.pack_int8(values, torch.ones(len(row)))
    scale, zero = _q.choose_qparams_per_token_asymmetric(row[None], torch.int8)
    stored = _q.quantize_per_token(row[None], scale, zero, -128, 127, torch.int8)
    expected = scale.float() * (stored - zero).float()
    for path in (p for p in ops.ISAS if has(p)):
        assert torch.equal(ops.integer_linear(row[None], packed, torch.zeros(len(row)), isa=path), expected)


@pytest.mark.parametrize("group", [0, 32])
def test_any_strides_and_dimensions(isa, group):
    weight, packed = layer(40, 96, group)
    bias = torch.zeros(40)
    for x in (
        activations(3, 5, 96).transpose(0, 1), activations(96, 7).T, activations(4, 192)[:, ::2],
        activations(96), activations(1, 96).expand(6, 96), activations(2, 0, 96),
    ):  # fmt: skip
        found = check(x, weight, packed, bias, group, isa)
        assert torch.equal(found, ops.integer_linear(x.contiguous(), packed, bias, group_size=group, isa=isa))


@pytest.mark.parametrize("function", ops.FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 9])
def test_functions_behind_the_layer(function, rows):
    _, packed = layer(50, 64, 32)
    x, bias = activations(rows, 64), torch.linspace(-2, 2, 50)
    plain = ops.integer_linear(x, packed, bias, group_size=32)
    found = ops.integer_linear(x, packed, bias, group_size=32, function=function)
    torch.testing.assert_close(found, apply_function(plain, function), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("group", [0, 64])
def test_a_row_that_is_not_finite_spoils_itself_alone(isa, group):
    _, packed = layer(40, 128, group)
    x, bias = activations(5, 128), torch.zeros(40)
    good = ops.integer_linear(x, packed, bias, group_size=group, isa=isa)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = x.clone()
        bad[2, 77] = value
        found = ops.integer_linear(bad, packed, bias, group_size=group, isa=isa)
        assert bool(found[2].isnan().all())
        assert torch.equal(found[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.parametrize("group", [0, 64])
def test_threads(group, two_threads):
    _, packed = layer(500, 512, group)
    inputs, bias = [activations(rows, 512, seed=rows) for rows in (1, 40, 300)], torch.zeros(500)

    def run(x):
        return ops.integer_linear(x, packed, bias, group_size=group)

    expected = [run(x) for x in inputs]
    torch.set_num_threads(1)
    assert all(torch.equal(run(x), y) for x, y in zip(inputs, expected, strict=True))
    torch.set_num_threads(2)
    wrong = []

    def work():
        for _ in range(10):
            wrong.extend(1 for x, y in zip(inputs, expected, strict=True) if not torch.equal(run(x), y))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(2, 96)}, "bytes packed"),
        ({"x": torch.zeros(2, 0)}, "inputs in the last"),
        ({"x": torch.zeros(2, 48)}, "no multiple of 32"),
        ({"packed": torch.zeros(7, dtype=torch.uint8)}, "bytes packed, given 7"),
        ({"bias": torch.zeros(33)}, "33 outputs"),
        ({"bias": torch.zeros(2, 8)}, "a bias is one row"),
        ({"group_size": 48}, "groups have 32, 64 or 128"),
        ({"function": "softmax"}, "one of none, relu"),
        ({"isa": "neon"}, "one of any, portable"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    _, packed = layer(8, 64, 32)
    given = {"x": torch.zeros(2, 64), "packed": packed, "bias": torch.zeros(8), "group_size": 32} | change
    with pytest.raises(InputError, match=message):
        ops.integer_linear(**given)


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (lambda: ops.pack_int8(torch.zeros(2, 3), torch.ones(2)), "int8 .out, in. is needed, given float32"),
        (lambda: ops.pack_int8(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3)), "scales .2. are needed"),
        (lambda: ops.pack_int8(torch.zeros(1, 65537, dtype=torch.int8), torch.ones(1)), "at most 65536"),
        (lambda: pack4(values=16), "values from 0 to 15"),
        (lambda: pack4(zeros=-1), "zeros from 0 to 15"),
        (lambda: pack4(groups=3), "scales .2, groups. for groups of"),
    ],
)
def test_weights_that_do_not_fit_are_refused(pack, message):
    with pytest.raises(InputError, match=message):
        pack()


def pack4(values=3, zeros=8, groups=2):
    return ops.pack_int4(
        torch.full((2, 64), values, dtype=torch.uint8), torch.ones(2, groups),
        torch.full((2, groups), zeros, dtype=torch.int8),
    )  # fmt: skip


@pytest.mark.parametrize("group", [0, 32])
def test_without_kernels_torch_computes_and_says_so(group, monkeypatch):
    _, packed = layer(40, 96, group)
    x, bias = activations(2, 5, 96), torch.linspace(-1, 1, 40)
    expected = ops.integer_linear(x, packed, bias, group_size=group, function="gelu")
    monkeypatch.setattr(_integer_linear, "native_problem", lambda: "there is no g++")
    with pytest.warns(UserWarning, match="runs on torch's operators.*there is no g"):
        found = ops.integer_linear(x, packed, bias, group_size=group, function="gelu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_compiler_is_a_problem_with_a_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install g++" in ops.native_missing() or "no g++" in ops.native_missing()
    with pytest.raises(ops.MissingCompilerError):
        ops.native_library(tmp_path)


def test_the_library_is_compiled_once_and_a_damaged_one_again(tmp_path):
    kept = ops.native_library()
    copy = tmp_path / kept.name
    shutil.copy(kept, copy)
    before = copy.stat().st_mtime_ns
    assert ops.native_library(tmp_path) == copy
    assert copy.stat().st_mtime_ns == before
    copy.write_bytes(kept.read_bytes()[:5000])
    assert ops.native_library(tmp_path).stat().st_size > 5000


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no g++-aarch64-linux-gnu to cross-compile with"
)
def test_for_arm(tmp_path):
    library = ops.build_op(_native._SOURCE, tmp_path / "linear.so", target="aarch64", flags=_native._FLAGS)
    assert machine_of(library) == "aarch64"
