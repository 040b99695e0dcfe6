"""Random small programs of branches, loops and jumps: the traced function must give what Python gives."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_r1.graph import jit

#: A vector each; `k` is a Python number, `m` a matrix and `n` a tensor that hold still.
VECTORS = ("x", "y")
_VALUES = ("x * 0.9 + y", "torch.tanh(x - y)", "x + row_mean(m) * 0.3", "-y", "x * k * 0.2", "torch.cos(x)", "y - 0.25")
_TESTS = (
    "x.sum() > 0", "y[0] < y[1]", "k > 2", "k % 2 == 0", "x.max() > y.max()", "not x[2] > 0.5", "-1 < x.sum() < 2",
    "x[0] > 0 and k < 4", "k == 1 or y.sum() > 0", "x[1] > 0 or y[1] > 0",
)  # fmt: skip


@st.composite
def blocks(draw: Any, depth: int, looping: bool) -> list[str]:
    """Lines of a block; `depth` more levels may follow inside."""
    lines: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        lines += draw(statements(depth, looping))
    if draw(st.integers(0, 5)) == 0:
        lines.append(draw(st.sampled_from(["return x, k", *(["break", "continue"] if looping else [])])))
    return lines


@st.composite
def statements(draw: Any, depth: int, looping: bool) -> list[str]:
    """Lines of one statement."""
    kind = draw(st.sampled_from(["vector", "vector", "number", "choice"] + ["if", "while", "for"] * (depth > 0)))
    test = draw(st.sampled_from(_TESTS))
    if kind == "vector":
        name = draw(st.sampled_from(VECTORS))
        return [draw(st.sampled_from([f"{name} = {draw(st.sampled_from(_VALUES))}", f"{name} = {name}.clone()"]))]
    if kind == "number":
        return [draw(st.sampled_from(["k = (k + 1) % 7", "k = k * 2 % 5", "k += 1"]))]
    if kind == "choice":
        return [f"x = {draw(st.sampled_from(_VALUES))} if {test} else y"]
    inner = indented(draw(blocks(depth - 1, looping or kind != "if")))
    if kind == "if":
        other = draw(st.booleans())
        return [f"if {test}:", *inner, *(["else:", *indented(draw(blocks(depth - 1, looping)))] if other else [])]
    if kind == "while":
        turns = f"turns{draw(st.integers(0, 10**6))}"
        return [f"{turns} = 0", f"while ({test}) and {turns} < 3:", f"    {turns} = {turns} + 1", *inner]
    head = draw(st.sampled_from(["for i in range(2):", "for i in range(n):", "for row in m:"]))
    use = "x = x + row * 0.1" if "row" in head else "x = x - i * 0.1"
    return [head, f"    {use}", *inner]


def indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def made(lines: list[str]) -> Any:
    """A function whose source can be found, as one typed in a session."""
    text = "\n".join(["def program(x, y, m, n):", "    k = 1", *indented(lines), "    return x, k", ""])
    name = f"<random {abs(hash(text))}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    scope: dict[str, Any] = {"torch": torch, "row_mean": row_mean}
    exec(compile(text, name, "exec"), scope)
    return scope["program"], text


def row_mean(m: torch.Tensor) -> torch.Tensor:
    return m.mean(0) if m.sum() > 0 else m.amax(0)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=blocks(2, False), seed=st.integers(0, 1000))
def test_random_programs(lines, seed):
    function, text = made(lines)
    traced = jit.trace(function)
    generator = torch.Generator().manual_seed(seed)
    for turn in range(4):
        x, y = torch.randn(2, 3, generator=generator)
        inputs = (x, y, torch.randn(4, 3, generator=generator), torch.tensor(turn))
        with torch.no_grad():
            found, count = traced(*inputs)
            wanted, turns = function(*inputs)
        assert torch.allclose(found, wanted, atol=1e-5), text
        assert (type(count), count) == (type(turns), turns), text
    assert len(traced.programs) == 1


def test_programs_have_what_they_are_meant_to_have():
    function, text = made(["if x.sum() > 0:", "    return x, k", "x = -y"])
    assert "def program" in text
    x = torch.ones(3)
    assert torch.equal(function(x, -x, x, x)[0], x)
    with pytest.raises(SyntaxError):
        made(["break"])
