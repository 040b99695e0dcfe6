"""Derivatives: from the expression, from a backward of its own, and where there is none."""

import pytest
import torch

from deepseek_r1.core import InputError


def doubles(*shapes, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * scale).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", [(5,), (3, 4), (), (0, 2)])
def test_swish(swish, shape):
    assert torch.autograd.gradcheck(swish(), doubles(shape))


def test_swish_of_a_view(swish):
    (x,) = doubles((4, 6))
    assert torch.autograd.gradcheck(lambda t: swish()(t.t()[::2]), [x])


def test_swish_is_flat_far_out_and_not_undefined(swish):
    x = torch.tensor([-200.0, -89.0, -30.0, 0.0, 30.0, 200.0], requires_grad=True)
    swish()(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shapes", [[(3, 4)] * 3, [(3, 4), (4,), (3, 1)], [(1,), (2, 3), ()], [(2, 1, 3), (5, 1), (1, 1, 1)]]
)
def test_inputs_that_broadcast(operators, shapes):
    assert torch.autograd.gradcheck(operators.blend, doubles(*shapes))


def test_only_what_is_wanted(operators):
    x, a, b = doubles((3, 4), (4,), (3, 1))
    reference = torch.autograd.grad(operators.blend(x, a, b).sin().sum(), [x, a, b])
    for number, t in enumerate((x, a, b)):
        inputs = [u if u is t else u.detach() for u in (x, a, b)]
        (alone,) = torch.autograd.grad(operators.blend(*inputs).sin().sum(), [t])
        torch.testing.assert_close(alone, reference[number])


def test_attributes_and_constants(operators):
    assert torch.autograd.gradcheck(operators.Affine(scale=1.7, negate=True), doubles((6,)))


@pytest.mark.parametrize("shapes", [[(3, 5), (3, 5)], [(4, 1, 6), (5, 6)], [(3, 5), (5,)], [(7,), (7,)]])
def test_through_a_row_reduction(gated_norm, shapes):
    assert torch.autograd.gradcheck(gated_norm(eps=0.1), doubles(*shapes))


def test_through_one_reduction_inside_another(operators):
    assert torch.autograd.gradcheck(operators.RowSoftmax(), doubles((3, 6)))


def test_a_row_of_equal_elements_shares_the_slope_of_its_largest(operators):
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (operators.RowSoftmax()(x) * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[-0.375, -0.125, 0.125, 0.375]], dtype=torch.float64))


def test_an_output_narrower_than_its_input(operators):
    assert torch.autograd.gradcheck(operators.weighted_total, doubles((3, 5), (3, 1)))
    assert torch.autograd.gradcheck(operators.weighted_total, doubles((3, 5), (1,)))
    assert torch.autograd.gradcheck(operators.weighted_total, doubles((3, 1), (3, 1)))


def test_several_outputs(operators):
    (x,) = doubles((4, 3))
    assert torch.autograd.gradcheck(operators.SineCosine(), [x])
    # One output unused: its gradient counts as zero.
    sine, _ = operators.SineCosine()(x)
    (slope,) = torch.autograd.grad(sine.sum(), x)
    torch.testing.assert_close(slope, x.detach().cos())


def test_a_backward_of_its_own(operators):
    x = torch.rand(5, 4, dtype=torch.float64).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(operators.Root(), [x])


def test_every_name_has_a_derivative(operators):
    x = torch.tensor([0.23, 0.61, 0.83, 1.31, 1.7, 2.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operators.everything, [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(operators, dtype):
    x, a, b = (t.detach().to(dtype) for t in doubles((50, 40), (40,), (50, 1)))
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    given = [t.requires_grad_() for t in (x, a, b)]
    operators.blend(*given).sum().backward()
    operators.blend(*exact).sum().backward()
    for t, e in zip(given, exact):
        assert t.grad.dtype == dtype
        torch.testing.assert_close(
            t.grad.double(), e.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-2 if dtype != torch.float32 else 1e-4
        )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pair_sum", (2, 2), "computes by hand.*backward"),
        ("pair_sum", (2, 4), "changes shapes.*backward"),
        ("in_steps", (2, 4), "reads its own output.*backward"),
        ("spread", (4, 4), "through a view.*backward"),
    ],
)
def test_where_no_derivative_can_be_found(operators, name, shape, message):
    x = torch.randn(shape, requires_grad=True)
    y = getattr(operators, name)(x)
    with pytest.raises(InputError, match=message):
        y.sum().backward()


def test_the_second_derivative_is_refused(swish):
    x = torch.randn(3, requires_grad=True)
    (slope,) = torch.autograd.grad(swish()(x).sum(), x, create_graph=True)
    with pytest.raises(InputError, match="'swish' can be differentiated once"):
        slope.sum().backward()
