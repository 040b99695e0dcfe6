"""What rewritten code calls. Each method decides if a condition is a tensor (kept) or a Python value (run as it is)."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from . import _calls
from ._calls import as_iteration, may_change
from ._iteration import Iteration
from ._join import Undefined
from ._jumps import RESULT
from ._region import storage
from ._tracing import Branch, Site, Tracing, current

_IN_PLACE: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "+=": (operator.iadd, operator.add), "-=": (operator.isub, operator.sub), "*=": (operator.imul, operator.mul),
    "/=": (operator.itruediv, operator.truediv), "//=": (operator.ifloordiv, operator.floordiv),
    "%=": (operator.imod, operator.mod), "**=": (operator.ipow, operator.pow),
    "@=": (operator.imatmul, operator.matmul), "&=": (operator.iand, operator.and_), "|=": (operator.ior, operator.or_),
    "^=": (operator.ixor, operator.xor), "<<=": (operator.ilshift, operator.lshift),
    ">>=": (operator.irshift, operator.rshift),
}  # fmt: skip
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
    "is": operator.is_, "is not": operator.is_not, "in": lambda a, b: a in b, "not in": lambda a, b: a not in b,
}  # fmt: skip


#: The local names at a statement, and those of them that it changes in place.
Scope = tuple[dict[str, Any], list[str]]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


class Runtime:
    """The `_dr` of one rewritten function."""

    def __init__(self, function: types.FunctionType) -> None:
        self._filename = function.__code__.co_filename
        self._name = function.__qualname__

    def _site(self) -> Site:
        """The user's line that is running: rewritten code keeps the line numbers."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != self._filename:
            frame = frame.f_back  # type: ignore[assignment]
        return Site(self._filename, frame.f_lineno if frame is not None else 0, self._name)

    # --- truth

    def _truth(self, value: Any) -> Any:
        """A condition as a bool tensor without dimensions, or as the Python value that it is."""
        if isinstance(value, Undefined):
            raise self._site().refuse(value.message)
        if not isinstance(value, torch.Tensor):
            return value
        if any(str(n) != "1" for n in value.shape):
            raise self._site().refuse(
                f"a condition of shape {tuple(value.shape)} has no single truth value. Use .any() or .all(). "
                "(Where the first dimension is always 1, pass dynamic_shapes={}.)"
            )
        value = value if value.dtype == torch.bool else value != 0
        return value.reshape(()) if value.ndim else value

    def _number(self, value: torch.Tensor) -> torch.Tensor:
        numbers = current().numbers
        return value if value in numbers else numbers.mark(value.clone())

    def not_(self, value: Any) -> Any:
        """`not value`."""
        test = self._truth(value)
        return self._number(torch.logical_not(test)) if isinstance(test, torch.Tensor) else not test

    def all_(self, first: Any, *more: Callable[[], Any]) -> Any:
        """The truth of `first and ...`; what follows is computed only if needed."""
        test = self._truth(first)
        if not more or (not isinstance(test, torch.Tensor) and not test):
            return test
        if not isinstance(test, torch.Tensor):
            return self.all_(more[0](), *more[1:])
        ways = (lambda: (self.all_(more[0](), *more[1:]),), lambda: (False,))
        return current().cond(test, ways, (), ("the result",), self._site())[0]

    def any_(self, first: Any, *more: Callable[[], Any]) -> Any:
        """The truth of `first or ...`; what follows is computed only if needed."""
        test = self._truth(first)
        if not more or (not isinstance(test, torch.Tensor) and test):
            return test
        if not isinstance(test, torch.Tensor):
            return self.any_(more[0](), *more[1:])
        ways = (lambda: (True,), lambda: (self.any_(more[0](), *more[1:]),))
        return current().cond(test, ways, (), ("the result",), self._site())[0]

    def every(self, first: Any, *more: Callable[[], Any]) -> Any:
        """The truth of `first and ...` where nothing that follows can fail: computed without a branch."""
        return self._combine(first, more, torch.logical_and, False)

    def either(self, first: Any, *more: Callable[[], Any]) -> Any:
        """The truth of `first or ...` where nothing that follows can fail: computed without a branch."""
        return self._combine(first, more, torch.logical_or, True)

    def _combine(self, first: Any, more: Sequence[Callable[[], Any]], both: Any, decisive: bool) -> Any:
        result = self._truth(first)
        for each in more:
            if not isinstance(result, torch.Tensor):
                if bool(result) is decisive:
                    return result
                result = self._truth(each())
                continue
            other = self._truth(each())
            if isinstance(other, torch.Tensor):
                result = both(result, other)
            elif bool(other) is decisive:
                return other
        return result

    def and_(self, first: Any, *more: Callable[[], Any]) -> Any:
        """The value of `first and ...`."""
        return self._either_value(first, more, True)

    def or_(self, first: Any, *more: Callable[[], Any]) -> Any:
        """The value of `first or ...`."""
        return self._either_value(first, more, False)

    def _either_value(self, first: Any, more: Sequence[Callable[[], Any]], go_on: bool) -> Any:
        if not more:
            return first
        test = self._truth(first)
        if not isinstance(test, torch.Tensor):
            return self._either_value(more[0](), more[1:], go_on) if bool(test) is go_on else first
        ways = (lambda: (self._either_value(more[0](), more[1:], go_on),), lambda: (first,))
        pair = ways if go_on else (ways[1], ways[0])
        return current().cond(test, pair, (), ("the result",), self._site())[0]

    def compare(self, left: Any, *more: Any) -> Any:
        """A chained comparison `left < a <= b`."""
        operator_, right = more[0], more[1]()
        result = _COMPARE[operator_](left, right)
        if len(more) == 2:
            return result
        return self.and_(result, lambda: self.compare(right, *more[2:]))

    def plain(self, value: Any) -> Any:
        """A condition at a place where a tensor's cannot be kept."""
        if isinstance(value, torch.Tensor):
            raise self._site().refuse(
                "a condition on a tensor inside a comprehension, `try` or `match` cannot be kept: the length or the "
                "way would depend on data. Use torch.where or an `if` of its own."
            )
        return value

    def plain_iter(self, value: Any) -> Any:
        """An iterable at a place where a loop over a tensor's values cannot be kept."""
        dynamic = isinstance(value, torch.Tensor) and value.ndim and not isinstance(value.shape[0], int)
        if isinstance(value, Iteration) or dynamic:
            raise self._site().refuse(
                "a loop over data inside a comprehension or `try` cannot be kept: its length would depend on data. "
                "Write a `for` loop that fills a tensor."
            )
        return value

    def assert_(self, value: Any, message: Callable[[], Any]) -> None:
        """`assert value, message`."""
        test = self._truth(value)
        if isinstance(test, torch.Tensor):
            raise self._site().refuse("an assert on a tensor's value cannot be kept. Check it outside the function.")
        if not test:
            raise AssertionError(message())

    def raised(self, error: Any) -> Any:
        """The error of a `raise`."""
        if current().nested:
            raise self._site().refuse(
                "a `raise` that a tensor decides cannot be kept: a graph has no errors. Check it outside the function, "
                "or return a flag."
            )
        return error

    # --- statements

    def if_(
        self,
        test: Any,
        then: Branch,
        other: Branch,
        state: Sequence[Any],
        names: Sequence[str],
        scope: Scope | None = None,
    ) -> tuple[Any, ...]:
        """`if`: the values of `names` after the branch that `test` chooses."""
        condition = self._truth(test)
        if not isinstance(condition, torch.Tensor):
            result: tuple[Any, ...] = (then if condition else other)(*state)
            return result
        self._refuse_shared(scope)
        return current().cond(condition, (then, other), state, names, self._site())

    def choose(self, test: Any, then: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """`then() if test else other()`."""
        ways = (lambda: (then(),), lambda: (other(),))
        return self.if_(test, *ways, (), ("the result",))[0]

    def while_(
        self, test: Branch, body: Branch, state: tuple[Any, ...], names: Sequence[str], scope: Scope | None = None
    ) -> tuple[Any, ...]:
        """`while`: turns are run as they are until the test is a tensor; from there on the loop is kept."""
        tracing = current()
        checked = lambda *values: self._truth(test(*values))  # noqa: E731
        while True:
            condition, _ = tracing.probe(checked, state)
            if isinstance(condition, torch.SymBool):
                # A dynamic size: as a Python condition it would fix the size, so the counters become tensors.
                counters = tuple(tracing.numbers.make(v) if type(v) in (int, float) else v for v in state)
                condition, _ = tracing.probe(checked, counters)
                state = counters if isinstance(condition, torch.Tensor) else state
            if isinstance(condition, torch.Tensor):
                break
            if not condition:
                return state
            state = body(*state)
        self._refuse_shared(scope)
        return tracing.loop(checked, body, state, names, self._site())

    def for_(
        self,
        items: Any,
        body: Branch,
        state: tuple[Any, ...],
        names: Sequence[str],
        stop: str | None,
        scope: Scope | None = None,
    ) -> tuple[Any, ...]:
        """`for`: over a tensor's rows or a range of data it is kept; over a Python iterable each turn is run."""
        tracing = current()
        if isinstance(items, Undefined):
            raise self._site().refuse(items.message)
        iteration = as_iteration(items, tracing)
        place = names.index(stop) if stop is not None else -1
        if iteration is None:
            return self._each(items, body, state, names, place, scope)
        self._refuse_shared(scope)

        def test(position: Any, *values: Any) -> Any:
            lengths = iteration.length()
            more = True
            for length in lengths if isinstance(lengths, list) else [lengths]:
                below = position < length
                more = below if more is True else torch.logical_and(more, below)  # type: ignore[assignment,arg-type]
            return more if place < 0 else self.every(self.not_(values[place]), lambda: more)

        def turn(position: Any, *values: Any) -> tuple[Any, ...]:
            return (position + 1, *body(iteration.item(position), *values))

        start = tracing.numbers.make(0)
        checked = lambda *values: self._truth(test(*values))  # noqa: E731
        kept = tracing.loop(checked, turn, (start, *state), ("the position", *names), self._site())
        return kept[1:]

    def _each(
        self,
        items: Iterable[Any],
        body: Branch,
        state: tuple[Any, ...],
        names: Sequence[str],
        place: int,
        scope: Scope | None,
    ) -> tuple[Any, ...]:
        tracing = current()
        outside = id(items) in tracing.guards.outside
        for item in items:
            if outside:
                tracing.guards.reach(item)
            stopped = state[place] if place >= 0 else False
            if isinstance(stopped, torch.Tensor):
                state = self.if_(stopped, lambda *s: s, lambda *s, v=item: body(v, *s), state, names, scope)
            elif stopped:
                break
            else:
                state = body(item, *state)
        return state

    def _refuse_shared(self, scope: Scope | None) -> None:
        """Refuse an in-place change of a variable whose memory another name shows: only one of them would change."""
        if scope is None:
            return
        held, changed = scope
        memory = {name: {storage(t) for t in _tensors(value)} for name, value in held.items()}
        memory["the inputs"] = {storage(t) for t in current().root().inputs}
        for name in changed:
            for other, found in memory.items():
                if other != name and found & memory[name]:
                    raise self._site().refuse(
                        f"{name!r} is changed in place under a tensor condition and shares its memory with {other!r}, "
                        f"which a graph cannot keep. Write {name} = {name} + 1, or begin with {name} = {name}.clone()."
                    )

    # --- names and places

    def undefined(self, name: str) -> Undefined:
        """The value of a name that has none yet."""
        return Undefined(name, slot=name == RESULT)

    def own(self, value: Any) -> Any:
        """The value of a variable that will be changed in place: inside a kept branch, a copy of the outer one."""
        tracing = current()
        if not isinstance(value, torch.Tensor) or not tracing.nested or id(value) in tracing.region.made:
            return value
        copied = value.clone()
        return tracing.numbers.mark(copied) if value in tracing.numbers else copied

    def inplace(self, sign: str, old: Any, new: Any) -> Any:
        """`old += new` and its like; gives the new value."""
        tracing = current()
        for value in (old, new):
            if isinstance(value, Undefined):
                raise self._site().refuse(value.message)
        change, compute = _IN_PLACE[sign]
        if isinstance(old, torch.Tensor):
            # A Python number is never changed in place, nor is what stands for one.
            if old in tracing.numbers:
                return compute(old, new)
            self._refuse_outside(old)
        elif isinstance(old, list | dict | set):
            may_change(tracing, self._site(), old, sign)
        return change(old, new)

    def _refuse_outside(self, tensor: torch.Tensor) -> None:
        tracing = current()
        if tracing.nested and id(tensor) not in tracing.region.made:
            raise self._site().refuse(
                "a tensor from outside is changed in place where a tensor decides whether it happens, which a graph "
                "cannot keep. Assign a new value to a local variable instead: y = y + 1."
            )

    def setitem(self, owner: Any, key: Any, value: Any) -> Any:
        """`owner[key] = value`; gives the owner."""
        if isinstance(owner, Undefined):
            raise self._site().refuse(owner.message)
        if isinstance(owner, torch.Tensor):
            self._refuse_outside(owner)
        else:
            may_change(current(), self._site(), owner, "[...] = ...")
        owner[key] = value
        return owner

    def set(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`."""
        tracing = current()
        buffer = isinstance(owner, torch.nn.Module) and name in owner._buffers
        if not (buffer and not tracing.nested):
            may_change(tracing, self._site(), owner, f".{name} = ...")
        setattr(owner, name, value)

    def get(self, owner: Any, name: str) -> Any:
        """`owner.name`."""
        if isinstance(owner, Undefined):
            raise self._site().refuse(owner.message)
        value = getattr(owner, name)
        tracing = current()
        if isinstance(owner, torch.Tensor | types.ModuleType):
            return value
        if id(owner) in tracing.guards.outside:
            module = isinstance(owner, torch.nn.Module)
            held = module and (name in owner._parameters or name in owner._buffers)
            if not held and not callable(getattr(type(owner), name, None)):
                tracing.guards.attribute(owner, name, value)
        return value

    def new(self, value: Any) -> Any:
        """A list, dict or set that is made here."""
        tracing: Tracing = current()
        tracing.region.fresh[id(value)] = value
        return value

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`."""
        if isinstance(function, Undefined):
            raise self._site().refuse(function.message)
        return _calls.call(self._site(), Runtime, function, args, kwargs)
