"""Linear layer and cross entropy in chunks, against the two of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_r1.core import InputError
from deepseek_r1.ops import known_labels, linear_cross_entropy


def _case(rows=7, size=5, words=11, *, bias=True, ignored=0.3, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, size, dtype=dtype), torch.randn(words, size, dtype=dtype)
    labels = torch.randint(0, words, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    leaves = [hidden, weight, *([torch.randn(words, dtype=dtype)] if bias else [])]
    return [t.requires_grad_() for t in leaves], labels


def _ours(leaves, labels, **options):
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2] if len(leaves) > 2 else None, **options)
    return loss, torch.autograd.grad(loss, leaves)


def _theirs(leaves, labels):
    loss = F.cross_entropy(F.linear(*leaves).float().flatten(0, -2), labels.flatten())
    return loss, torch.autograd.grad(loss, leaves)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20), size=st.integers(1, 9), words=st.integers(1, 30), chunk=st.integers(1, 25),
    bias=st.booleans(), ignored=st.sampled_from([0.0, 0.4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_equals_the_two_layers(rows, size, words, chunk, bias, ignored, seed):
    leaves, labels = _case(rows, size, words, bias=bias, ignored=ignored, seed=seed)
    labels[0] = 0
    loss, grads = _ours(leaves, labels, chunk_rows=chunk)
    expected, expected_grads = _theirs(leaves, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_in_double_precision(bias):
    leaves, labels = _case(bias=bias, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: linear_cross_entropy(t[0], t[1], labels, t[2] if bias else None, chunk_rows=3), leaves
    )


def test_leading_dimensions_and_another_ignored_label():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(6, 4), torch.tensor([[0, 5, 1], [1, 1, 2]])
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=1)
    assert torch.isclose(linear_cross_entropy(hidden, weight, labels, ignore_index=1), expected)


@pytest.mark.parametrize("rows", [4, 0])
def test_no_label_at_all_changes_nothing(rows):
    leaves, labels = _case(rows)
    loss, grads = _ours(leaves, torch.full_like(labels, -100))
    assert loss.item() == 0
    assert all(not g.any() for g in grads)


def test_bf16_is_as_good_as_bf16_logits_with_an_fp32_softmax():
    leaves, labels = _case(64, 32, 50, dtype=torch.bfloat16)
    loss, grads = _ours(leaves, labels, chunk_rows=16)
    exact, exact_grads = _theirs([t.detach().double().requires_grad_() for t in leaves], labels)
    plain, plain_grads = _theirs(leaves, labels)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= abs(plain - exact) + 1e-5
    for got, usual, true in zip(grads, plain_grads, exact_grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - true).norm() <= 1.1 * (usual - true).norm()


def test_many_rows_do_not_underflow_in_fp16():
    torch.manual_seed(0)
    hidden = torch.randn(4096, 4, dtype=torch.float16, requires_grad=True)
    weight, labels = torch.randn(64, 4, dtype=torch.float16), torch.randint(0, 64, (4096,))
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * 2.0**14, hidden)
    exact = hidden.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(exact @ weight.double().T, labels) * 2.0**14, exact)
    assert (grad - true).norm() < 0.01 * true.norm()


def test_autocast_computes_the_product_in_its_type():
    leaves, labels = _case(16, 8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = _ours(leaves, labels)
    half = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected, expected_grads = _ours(half, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted.float(), rtol=1e-2, atol=1e-3)


def test_backward_twice_and_a_scaled_loss():
    leaves, labels = _case()
    loss = linear_cross_entropy(*leaves[:2], labels, leaves[2])
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss * 3 + loss, leaves)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(4 * a, b)


def test_one_weight_used_twice():
    (hidden, table, _), labels = _case()
    states = hidden + table[0]
    loss = linear_cross_entropy(states, table, labels)
    expected = F.cross_entropy(states @ table.T, labels)
    for got, wanted in zip(
        torch.autograd.grad(loss, [hidden, table], retain_graph=True), torch.autograd.grad(expected, [hidden, table])
    ):
        torch.testing.assert_close(got, wanted)


def test_the_gradient_has_no_gradient():
    leaves, labels = _case()
    loss = linear_cross_entropy(leaves[0], leaves[1], labels)
    (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


def test_without_gradients_none_are_made():
    leaves, labels = _case()
    with torch.no_grad():
        loss = linear_cross_entropy(leaves[0], leaves[1], labels)
    assert not loss.requires_grad
    frozen = linear_cross_entropy(leaves[0], leaves[1].detach(), labels)
    assert torch.equal(loss, frozen)
    frozen.backward()
    assert leaves[0].grad is not None


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(dynamic):
    def step(hidden, weight, labels):
        return linear_cross_entropy(hidden * 2, weight, labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (7, 9):
        leaves, labels = _case(rows, bias=False)
        expected = torch.autograd.grad(step(*leaves, labels), leaves)
        for got, wanted in zip(torch.autograd.grad(compiled(*leaves, labels), leaves), expected, strict=True):
            assert torch.equal(got, wanted)


def test_compiled_under_autocast():
    leaves, labels = _case(bias=False)

    def step(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(hidden, weight, labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), step(*leaves))


def test_the_operator_keeps_torchs_rules():
    leaves, labels = _case()
    arguments = (leaves[0].detach(), leaves[1].detach(), labels, None, torch.rand(len(labels)), -100, 3, torch.float32,
                 True, True, False)  # fmt: skip
    torch.library.opcheck(torch.ops.deepseek_r1.linear_cross_entropy.default, arguments)


def test_it_needs_less_memory_than_the_logits():
    # 4,096 rows of 16,384 words: 256 MiB of logits in fp32, and as much for their gradient.
    code = """
import resource, torch
from deepseek_r1.ops import linear_cross_entropy
hidden, weight = torch.randn(4096, 16, requires_grad=True), torch.randn(16384, 16, requires_grad=True)
labels = torch.randint(0, 16384, (4096,))
linear_cross_entropy(hidden[:8], weight, labels[:8]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, labels).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (5, 6), (3,), None), "of the same D"),
        (((3, 4), (5, 4), (4,), None), "without its last dimension"),
        (((3, 4), (5, 4), (3,), (4,)), "a number for each row"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    hidden, weight, labels, bias = shapes
    with pytest.raises(InputError, match=message):
        linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.long),
            None if bias is None else torch.zeros(bias),
        )  # fmt: skip


def test_types_that_do_not_fit():
    hidden, weight, labels = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(InputError, match="integers are needed"):
        linear_cross_entropy(hidden, weight, labels.float())
    with pytest.raises(InputError, match="one floating type for all"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(InputError, match="chunk_rows=0"):
        linear_cross_entropy(hidden, weight, labels, chunk_rows=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("label", [-1, 11, 500, -101])
def test_a_label_out_of_range_is_named(label, dtype):
    leaves, labels = _case()
    labels = labels.to(dtype)
    labels[3] = label
    with pytest.raises(
        InputError, match=rf"the label {label} is out of range: labels are 0 to 10 .* or -100 \(ignore_index"
    ):
        linear_cross_entropy(leaves[0], leaves[1], labels)
    with pytest.raises(InputError, match=rf"the label {label} is out of range"):
        torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(leaves[0], leaves[1], labels)


def test_an_ignored_label_may_be_any():
    leaves, labels = _case(ignored=0)
    for ignored in (500, -1, 3):
        kept = torch.where(torch.arange(7) < 3, ignored, torch.where(labels == ignored, 0, labels))
        loss = linear_cross_entropy(leaves[0], leaves[1], kept, ignore_index=ignored)
        torch.testing.assert_close(
            loss, F.cross_entropy(leaves[0][3:] @ leaves[1].T, kept[3:], ignore_index=ignored), msg=str(ignored)
        )


def test_labels_that_nobody_can_wait_for_become_ignored():
    @torch.compile(fullgraph=True, backend="eager")
    def known(labels):
        return known_labels(labels, 11)

    labels, wrong = known(torch.tensor([3, -1, -100, 11, 0]))
    assert labels.tolist() == [3, -100, -100, -100, 0]
    assert bool(wrong)
    assert not bool(known(torch.tensor([3, 10, -100]))[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("label", [-1, 11, 2**40])
def test_on_a_gpu_a_label_out_of_range_is_no_number(label, dtype):
    leaves, labels = _case(dtype=dtype)
    leaves = [t.detach().cuda().requires_grad_() for t in leaves]
    labels[3] = label
    loss, grads = _ours(leaves, labels.cuda())
    assert loss.isnan()
    assert all(g.isnan().all() for g in grads)
    good, grads = _ours(leaves, torch.zeros_like(labels).cuda())
    assert good.isfinite()
    assert all(g.isfinite().all() for g in grads), "the device goes on"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_can_be_captured_in_a_cuda_graph():
    leaves, labels = _case(64, 32, 50, bias=False)
    leaves = [t.detach().cuda().requires_grad_() for t in leaves]
    labels = labels.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Nothing may keep the graph of this pass: its nodes belong to this stream's next pass otherwise.
        expected = [t.detach().clone() for t in (lambda found: (found[0], found[1][1]))(_ours(leaves, labels))]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss, grads = _ours(leaves, labels)
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close([loss, grads[1]], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(37, 1000), (300, 40_001), (5, 3)])
def test_on_a_gpu_it_is_the_same(dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, 64), torch.randn(vocabulary, 64) / 4, torch.randn(vocabulary)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::5] = -100
    given = [t.to(dtype).cuda().requires_grad_() for t in (hidden, weight, bias)]
    # The same rounded numbers, in double precision.
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    found = linear_cross_entropy(given[0], given[1], labels.cuda(), given[2], chunk_rows=64)
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*exact), labels)
    limit = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=limit, atol=limit)
    found.backward()
    expected.backward()
    for mine, theirs in zip(given, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        off = (mine.grad.cpu().double() - theirs.grad).norm() / theirs.grad.norm()
        assert float(off) < 2 * limit


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_count_by_their_weights(rows, bias):
    hidden, weight = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    added = torch.randn(11, dtype=torch.float64) if bias else None
    leaves = [t.requires_grad_() for t in (hidden, weight, added) if t is not None]
    labels = torch.randint(0, 11, (2, 5))
    labels[0, :2] = -100
    shares = torch.rand(2, 5, dtype=torch.float64)
    shares[1, 3] = 0
    found = linear_cross_entropy(hidden, weight, labels, added, row_weights=shares, chunk_rows=rows)
    each = F.cross_entropy(F.linear(hidden, weight, added).flatten(0, 1), labels.flatten(), reduction="none")
    kept = shares * (labels != -100)
    expected = (each * kept.flatten()).sum() / kept.sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))
    nothing = linear_cross_entropy(hidden, weight, labels, added, row_weights=torch.zeros(2, 5))
    assert nothing == 0
    assert not any(g.any() for g in torch.autograd.grad(nothing, leaves))
    with pytest.raises(InputError, match="row_weights"):
        linear_cross_entropy(hidden, weight, labels, row_weights=torch.ones(5))
