"""Functions with control flow on tensors; each says whether it is kept or refused, and is held to plain Python.

A kept function is captured with its first input only. All its inputs must then give what Python gives, without another
capture, whichever branch they take; its gradients too; and the graph must hold the branches and loops it names.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

from deepseek_r1.core import CaptureError
from deepseek_r1.graph import jit

KEPT: list[Kept] = []
REFUSED: list[Refused] = []


@dataclass
class Kept:
    """A function, its inputs, and what its graph must hold: "cond", "while_loop" or both."""

    function: Callable[..., Any]
    inputs: list[tuple[Any, ...]]
    holds: str
    graphs: int = 1


@dataclass
class Refused:
    """A function, an input, and parts of the message."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    says: tuple[str, ...]
    line: str = field(default="")


def kept(holds: str, *inputs: Any, graphs: int = 1) -> Callable[..., Any]:
    """State that a function is kept."""

    def note(function: Any) -> Any:
        given = [i if isinstance(i, tuple) else (i,) for i in inputs]
        KEPT.append(Kept(function, given, holds, graphs))
        return function

    return note


def refused(inputs: Any, line: str, *says: str) -> Callable[..., Any]:
    """State that a function is refused, at which line, and what the message says."""

    def note(function: Any) -> Any:
        REFUSED.append(Refused(function, inputs if isinstance(inputs, tuple) else (inputs,), says, line))
        return function

    return note


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values)


UP, DOWN, MIXED = vector(1.0, 2.0, 3.0), vector(-1.0, -2.0, -3.0), vector(1.0, -2.0, 0.5)
ROWS = torch.arange(12.0).reshape(4, 3) - 4
ONES = torch.ones(4, 3)

# --- branches


@kept("cond", UP, DOWN, MIXED)
def one_branch(x):
    if x.sum() > 0:
        x = x * 2
    return x


@kept("cond", UP, DOWN, MIXED)
def two_branches_with_numbers(x):
    if x.mean() > 0:
        scale, shift = 2, 0.1
    else:
        scale, shift = 3, 0.2
    return x * scale + shift, scale, shift


@kept("cond", UP, DOWN, MIXED, UP * 10)
def elif_chain(x):
    total = x.sum()
    if total > 20:
        y = torch.sin(x)
    elif total > 0:
        y = torch.cos(x)
    elif total > -1:
        y = x
    else:
        y = -x
    return y + 1


@kept("cond", UP, DOWN, MIXED, UP * 10)
def early_returns(x):
    if x.sum() < -3:
        return x - 1
    y = x * x
    if y.max() > 50:
        return y / 10
    return y


@kept("cond", UP, DOWN, MIXED, -DOWN * 5)
def nested_branches(x):
    if x[0] > 0:
        if x[1] > 0:
            y = x.exp()
        else:
            y = x + 1
        z = y * 2
    else:
        y = x
        z = x.abs()
    return y, z


@kept("cond", UP, DOWN, MIXED)
def conditional_expression(x):
    return x.relu() if x.max() > 2 else x.neg() if x.min() < -2.5 else x.tanh()


@kept("cond", (UP, vector(1.0)), (DOWN, vector(1.0)), (UP, vector(-1.0)), (DOWN, vector(-1.0)))
def boolean_operators(x, y):
    if (x.sum() > 0 and y[0] > 0) or not (x[0] > -1 or y[0] < 0):
        return x + y
    return x - y


@kept("cond", UP, DOWN, MIXED, UP * 100)
def chained_comparison(x):
    if -5 < x.sum() <= 6 != x[0]:
        return x * 2
    return x * 3


@kept("cond", UP, DOWN, MIXED)
def values_of_and_and_or(x):
    a, b = x[0], x.relu()[2]
    return (a and b) + (b or a)


@kept("cond", UP, DOWN, MIXED)
def dictionary_result(x):
    state = {"value": x, "steps": (x.sum(), 0)}
    if x.sum() > 0:
        state = {"value": x / 2, "steps": (x.max(), 1)}
    return state


@kept("cond", UP, DOWN, MIXED)
def in_place_on_a_copy(x):
    y = x.clone()
    if y.sum() > 0:
        y += 1
        y[0] = 5
        y.mul_(2)
    return y


@kept("cond", UP, DOWN, MIXED)
def python_numbers(x):
    value = x.sum().item()
    best = max(value, 0.5)
    if best > 1:
        value = -value
    return value, int(best), bool(x[0] > 0), x * best


@kept("cond", UP, DOWN, MIXED)
def largest_of_tensors(x):
    return max(x[0], x[1], x[2]) - min(x[0], x[1])


@kept("cond", UP.double(), DOWN.double())
def a_float_stays_exact(x):
    step = 0.1
    if x.sum() > 0:
        step = 0.3
    return x * step


@kept("cond", (UP, 2), (DOWN, 2), (UP, 3), (DOWN, 3), graphs=2)
def python_condition(x, power):
    y = x
    if power == 2:
        y = y * y
    else:
        for _ in range(power):
            y = y * 1.5
    return y if y.sum() > 7 else y - 1


def _scaled(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    if x.sum() > 0:
        return x * by
    return _twice(x)


def _twice(x: torch.Tensor) -> torch.Tensor:
    while x.abs().sum() < 50:
        x = x * 2
    return x


@kept("cond while_loop", UP, DOWN, MIXED)
def calls_functions(x):
    return _scaled(x) + _scaled(x, by=3.0)


def _logged(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) + 1

    return wrapper


@kept("cond", UP, DOWN, MIXED)
@_logged
def decorated(x):
    return x if x[0] > 0 else x * 3


def _closure() -> Any:
    weight = torch.tensor([1.0, 2.0, 3.0])

    def inner(x):
        pick = lambda t: t * weight if t.sum() > 0 else t + weight  # noqa: E731
        return pick(x) + pick(-x)

    return inner


kept("cond", UP, DOWN, MIXED)(_closure())

branch_in_a_lambda = lambda x: x * 2 if x.sum() > 0 else x * 5  # noqa: E731
kept("cond", UP, DOWN, MIXED)(branch_in_a_lambda)


class Gate(torch.nn.Module):
    """A module with a branch, a submodule in a library container, and a Python flag."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bias = bias
        self.blocks = torch.nn.Sequential(torch.nn.Linear(3, 3), Clip(), torch.nn.Linear(3, 3))
        self.shift = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        y = self.blocks(x)
        if self.bias:
            y = y + self.shift
        return y if self.score(y) > 0 else self.blocks[0](y)

    def score(self, y):
        return y.mean()


class Clip(torch.nn.Module):
    def forward(self, x):
        if x.abs().max() > 2:
            return x / 2
        return x


kept("cond", ROWS, ONES, -5 * ONES)(Gate().eval())

# --- loops


@kept("while_loop", UP, UP * 100, DOWN)
def halve(x):
    steps = 0
    while x.sum() > 1:
        x = x / 2
        steps += 1
    return x, steps


@kept("while_loop", (UP, torch.tensor(3)), (UP, torch.tensor(0)), (DOWN, torch.tensor(7)))
def power(x, n):
    y = torch.ones_like(x)
    for _ in range(n):
        y = y * x
    return y


@kept("while_loop", (UP, torch.tensor(9)), (UP, torch.tensor(2)), (UP, torch.tensor(-4)))
def range_with_start_and_step(x, n):
    total = 0
    for i in range(1, n, 3):
        total += i
        x = x + i / 2
    return x, total


@kept("while_loop", ROWS, ONES, ROWS[:2], torch.ones(7, 3))
def rows_of_a_tensor(x):
    total = torch.zeros(3)
    for row in x:
        total += row * 2
    return total


@kept("while_loop cond", ROWS, ONES, -ONES, ROWS[:3])
def continue_and_break(x):
    total, seen = torch.zeros(3), 0
    for row in x:
        if row[0] < 0:
            continue
        if row.sum() > 10:
            break
        total = total + row
        seen += 1
    return total, seen


@kept("while_loop cond", ROWS, ONES, -ONES)
def return_from_a_loop(x):
    for i, row in enumerate(x):
        if row.sum() > 2:
            return row, i
    return x[0] * 0, -1


@kept("while_loop cond", ROWS, ONES, -ONES)
def else_of_a_loop(x):
    best = x[0]
    for row in x:
        if row[1] > 3:
            best = row
            break
    else:
        best = best - 1
    return best


@kept("while_loop", (ROWS, ONES), (ONES, ROWS))
def zip_of_two(x, y):
    dots = torch.tensor(0.0)
    for a, b in zip(x, y):
        dots = dots + (a * b).sum()
    return dots


@kept("while_loop", ROWS, ONES, ROWS[:2])
def fills_a_tensor(x):
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        out[i] = x[i] * i
        out[i, 0] += 1
        out[-1, 1] = i
    return out


@kept("while_loop", ROWS, ONES, ROWS[:3])
def while_over_a_size(x):
    i, total = 0, torch.tensor(0.0)
    while i < x.shape[0]:
        total = total + x[i].sum() * i
        i += 1
    return total


@kept("cond while_loop", UP, DOWN, UP * 50)
def while_true(x):
    steps = 0
    while True:
        x = x * 0.5
        steps += 1
        if x.abs().max() < 1:
            break
    return x, steps


@kept("while_loop", UP, DOWN, UP * 50)
def loop_in_a_loop(x):
    rounds = 0
    while x.abs().sum() > 3:
        y = x
        while y.abs().max() > 2:
            y = y / 3
            rounds += 1
        x = x / 2 + y * 0.1
    return x, rounds


@kept("cond", UP, DOWN, MIXED, UP * 3)
def break_from_a_python_range(x):
    for i in range(4):  # noqa: B007
        x = x * 1.5
        if x.max() > 4:
            break
    return x, i


@kept("cond while_loop", UP, DOWN, MIXED)
def collatz(x):
    n = int(x.abs().sum() * 3)
    steps = 0
    while n > 1 and steps < 200:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


class State(NamedTuple):
    value: torch.Tensor
    error: torch.Tensor


@kept("while_loop", UP, UP * 30, UP / 100)
def newton_with_a_named_tuple(x):
    state = State(x, (x * x - 2).abs().max())
    while state.error > 1e-4:
        value = state.value - (state.value**2 - 2) / (2 * state.value)
        state = State(value, (value * value - 2).abs().max())
    return state


# --- refused


@refused(UP, "if x.sum() > 0:", "'y'", "shape differs: (2,) against")
def shapes_differ(x):
    if x.sum() > 0:
        y = x[:2]
    else:
        y = x
    return y


@refused(UP, "if x.sum() > 0:", "dtype differs: torch.float32 against torch.int64")
def types_differ(x):
    if x.sum() > 0:
        return x
    return x.long()


@refused(UP, "if x.sum() > 0:", "structure differs")
def structures_differ(x):
    if x.sum() > 0:
        return x, x
    return x


@refused(UP, "if x.sum() > 0:", "on one way and None on the other")
def nothing_or_a_tensor(x):
    if x.sum() > 0:
        return x
    return None


@refused(UP, "if x.sum() > 0:", "'mode'", "'up' on one way and 'down' on the other")
def text_depends_on_data(x):
    mode = "down"
    if x.sum() > 0:
        mode = "up"
    return x * len(mode)


@refused(UP, "return x + y", "variable 'y' may have no value")
def defined_in_one_branch(x):
    if x.sum() > 0:
        y = x * 2
    return x + y


@refused(UP, "found.append(x)", "list", "depend on data")
def append_under_a_condition(x):
    found = []
    if x.sum() > 0:
        found.append(x)
    return x * len(found)


@refused(ROWS, "rows.append(row * 2)", "list", "tensor of fixed size")
def append_in_a_loop(x):
    rows = []
    for row in x:
        rows.append(row * 2)
    return torch.stack(rows)


@refused(ROWS, "return [row for row in x if row.sum() > 0]", "comprehension")
def filtering_comprehension(x):
    return [row for row in x if row.sum() > 0]


@refused(UP, "raise ValueError", "a graph has no errors")
def raise_under_a_condition(x):
    if x.sum() > 100:
        raise ValueError("too large")
    return x


@refused(UP, "assert x.sum() > 0", "assert")
def assert_on_a_tensor(x):
    assert x.sum() > 0
    return x


@refused(UP, "if x.sum() > 0:", "inside", "try")
def branch_inside_try(x):
    try:
        if x.sum() > 0:
            x = x * 2
    except ValueError:
        pass
    return x


@refused(UP, "print(x)", "side effect")
def prints(x):
    print(x)  # noqa: T201
    return x


_SEEN: list[Any] = []
_COUNT = 0


@refused(UP, "_SEEN.append(1)", "outside the function", "side effect")
def appends_to_a_global(x):
    _SEEN.append(1)
    return x


@refused(UP, "global _COUNT", "side effect")
def assigns_a_global(x):
    global _COUNT
    _COUNT = 1
    return x


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


refused(UP, "self.calls += 1", "Counting", "side effect")(Counting().eval())


@refused(UP, "def generator(x):", "generator")
def generator(x):
    yield x


@refused(torch.tensor(5.0), "return x * factorial(x - 1)", "calls itself", "while")
def factorial(x):
    if x <= 1:
        return x
    return x * factorial(x - 1)


@refused(ROWS, "while grown.sum() < 100:", "'grown'", "shape differs")
def grows(x):
    grown = x
    while grown.sum() < 100:
        grown = torch.cat([grown, x.abs() + 1])
    return grown


@refused(UP, "if x.sum() > 0:", "the inputs", "x.clone()")
def in_place_on_an_input(x):
    if x.sum() > 0:
        x += 1
    return x


@refused(UP, "if y.sum() >= 0:", "shares its memory")
def in_place_on_a_shared_value(x):
    y = torch.zeros(3) * x
    z = y
    if y.sum() >= 0:
        y += 1
    return y, z


@refused(UP, "if x > 0:", "condition of shape", ".any()")
def condition_without_a_single_value(x):
    if x.sum() > 100:  # noqa: SIM102
        if x > 0:
            return x
    return -x


@refused(UP, "for value in x.tolist():", "tolist")
def loops_over_a_list_of_data(x):
    total = 0
    for value in x.tolist():
        total += value
    return total


@refused(ROWS, "for row in x:", "'total'", "torch.zeros")
def begins_with_a_number(x):
    total = 0
    for row in x:
        total = total + row
    return total


def name_of(case: Any) -> str:
    function = case.function
    return getattr(function, "__name__", type(function).__name__)


def same(found: Any, wanted: Any) -> None:
    """Equal values, types, kinds and structure."""
    flat, tree = pytree.tree_flatten(found)
    expected, expected_tree = pytree.tree_flatten(wanted)
    assert tree == expected_tree
    for a, b in zip(flat, expected, strict=True):
        assert type(a) is type(b), (a, b)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b


def leaf(value: Any) -> Any:
    """A copy of an input that collects gradients."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.clone().requires_grad_()
    return value


def gradients(function: Any, inputs: tuple[Any, ...], weights: list[torch.Tensor]) -> list[Any] | None:
    """Of the sum of all floating-point results; None where no result has one."""
    given = [leaf(v) for v in inputs]
    results = [v for v in pytree.tree_leaves(function(*given)) if isinstance(v, torch.Tensor) and v.requires_grad]
    if not results:
        return None
    wanted = [v for v in (*given, *weights) if isinstance(v, torch.Tensor) and v.requires_grad]
    total = sum((r * torch.arange(1.0, r.numel() + 1).reshape(r.shape).to(r.dtype)).sum() for r in results)
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted)]


@functools.cache
def captured(number: int) -> jit.Traced:
    case = KEPT[number]
    traced = jit.trace(case.function)
    with torch.no_grad():
        traced(*case.inputs[0])
    return traced


NUMBERS = range(len(KEPT))
IDS = [name_of(case) for case in KEPT]


@pytest.mark.parametrize("number", NUMBERS, ids=IDS)
def test_every_way_gives_what_python_gives(number):
    case, traced = KEPT[number], captured(number)
    for inputs in case.inputs:
        with torch.no_grad():
            same(traced(*inputs), case.function(*inputs))
    assert len(traced.programs) == case.graphs


@pytest.mark.parametrize("number", NUMBERS, ids=IDS)
def test_the_graph_holds_the_control_flow(number):
    case, traced = KEPT[number], captured(number)
    found = {
        str(node.target)
        for part in traced.program.exported.graph_module.modules()
        for node in getattr(getattr(part, "graph", None), "nodes", ())
        if node.op == "call_function"
    }
    for kind in case.holds.split():
        assert kind in found
        assert traced.kept[kind]


@pytest.mark.parametrize("number", NUMBERS, ids=IDS)
def test_gradients_are_pythons(number):
    case, traced = KEPT[number], captured(number)
    weights = list(case.function.parameters()) if isinstance(case.function, torch.nn.Module) else []
    for inputs in case.inputs:
        wanted = gradients(case.function, inputs, weights)
        found = gradients(traced, inputs, weights)
        if wanted is None:
            # Python took a way without gradients; a graph has one for every way, and it must be zero.
            assert found is None or all(not g.any() for g in found)
            continue
        assert found is not None
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_cannot_be_kept_says_where_and_why(case):
    with contextlib.suppress(Exception), torch.no_grad():
        case.function(*[v.clone() for v in case.inputs])
    with pytest.raises(CaptureError) as caught, torch.no_grad():
        jit.trace(case.function)(*case.inputs)
    message = str(caught.value)
    assert case.line in message
    assert "test_corpus.py, line" in message
    for part in case.says:
        assert part in message, message


def test_the_corpus_is_large_enough():
    assert len(KEPT) + len(REFUSED) >= 40
    assert F is torch.nn.functional
