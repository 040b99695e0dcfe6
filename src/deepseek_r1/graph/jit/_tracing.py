"""Building `cond` and `while_loop` while torch.export runs the rewritten function. Knows no Python syntax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.while_loop import while_loop_op
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from . import _join
from ._guards import Guards
from ._join import CannotJoin, Kept, Nest, Undefined
from ._numbers import Numbers
from ._region import Region, storage, version
from ._source import refusal

Branch = Callable[..., Any]
_ROUNDS = 6


@dataclass(frozen=True)
class Site:
    """A line of the user's, for messages."""

    filename: str
    line: int
    function: str

    def refuse(self, problem: str) -> Exception:
        """The error for something at this line."""
        return refusal(self.filename, self.line, self.function, problem)


@dataclass
class Tracing:
    """The state of one capture.

    Attributes:
        region: the innermost branch or loop that is being run.
        kept: how many branches and loops went into the graph, by kind.
        stack: code of the rewritten functions that are running, outermost first.
        patch: prepares a module that the function calls, so that its forward is followed.
    """

    region: Region
    numbers: Numbers
    guards: Guards
    patch: Callable[[torch.nn.Module], None]
    kept: dict[str, int] = field(default_factory=dict)
    stack: list[Any] = field(default_factory=list)

    @property
    def nested(self) -> bool:
        """Whether a tensor decides if what runs now would run at all."""
        return self.region.parent is not None

    @contextmanager
    def _inside(self, region: Region) -> Iterator[Region]:
        before = self.region
        with before.paused(), region:
            self.region = region
            try:
                yield region
            finally:
                self.region = before

    def probe(
        self, function: Branch, values: Sequence[Any], standing: Sequence[torch.Tensor] = ()
    ) -> tuple[Any, Region]:
        """Run a branch without recording anything; also gives what it used."""
        region = Region(self.region, dry=True, numbers=self.numbers)
        region.inside |= {id(t) for t in standing}
        with disable_proxy_modes_tracing(), self._inside(region):
            result = function(*values)
            region.replaced([v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)])
        return result, region

    def _likes(self, kinds: Sequence[Nest]) -> list[torch.Tensor]:
        made = []
        for nest in kinds:
            for kind in nest.leaves:
                if isinstance(kind, Kept):
                    with torch._C.DisableTorchFunction():
                        tensor = torch.empty(kind.size, dtype=kind.dtype, device=kind.device)
                    made.append(self.numbers.mark(tensor) if kind.number else tensor)
        return made

    # --- branches

    def cond(
        self,
        test: torch.Tensor,
        branches: tuple[Branch, Branch],
        state: Sequence[Any],
        names: Sequence[str],
        site: Site,
    ) -> tuple[Any, ...]:
        """One of two functions of `state`, chosen by a tensor when the graph runs. Both give `names`."""
        outcomes = [self.probe(branch, state) for branch in branches]
        for _, region in outcomes:
            self._refuse_changes(region, site, "a branch under a tensor condition")
        kinds = []
        for number, name in enumerate(names):
            one, other = (_join.describe(result[number], self.numbers) for result, _ in outcomes)
            kinds.append(self._joined(name, one, other, site, "the branches of a condition on a tensor"))
        slots = [outcomes[0][0][i] if k is _join.EMPTY else None for i, k in enumerate(kinds)]
        if not any(isinstance(kind, Kept) for nest in kinds for kind in nest.leaves):
            return tuple(_join.rebuild([], kinds, slots))
        outer = self._outer([region for _, region in outcomes])
        operands = self.region.resolve(outer)
        pred = self.region.operand(test)
        self._count("cond")
        if self.region.dry:
            return tuple(self._adopted(_join.rebuild(self._likes(kinds), kinds, slots)))
        functions = [self._branch(branch, state, outer, kinds) for branch in branches]
        with self.region.paused():
            results = cond_op(pred, functions[0], functions[1], tuple(operands))
        return tuple(self._adopted(self._rebuilt(results, kinds, slots)))

    def _branch(
        self, branch: Branch, state: Sequence[Any], outer: Sequence[torch.Tensor], kinds: Sequence[Nest]
    ) -> Branch:
        def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
            region = Region(self.region, dry=False, numbers=self.numbers, closed=True)
            for tensor, operand in zip(outer, operands):
                region.place(tensor, operand)
            with self._inside(region):
                return self._outputs(branch(*state), kinds, region)

        return run

    def _outputs(self, values: Sequence[Any], kinds: Sequence[Nest], region: Region) -> tuple[torch.Tensor, ...]:
        """The tensors that a region gives, none of which may share memory with an operand or another one."""
        flat = _join.tensors(values, kinds, self.made)
        taken = region.storages() | {storage(t) for t in region.standing}
        out = []
        for tensor in flat:
            # The two branches must agree on the layout too.
            plain = tensor.contiguous()
            if storage(plain) in taken:
                plain = plain.clone(memory_format=torch.contiguous_format)
            taken.add(storage(plain))
            out.append(plain)
        return tuple(out)

    def made(self, value: Any, kind: Kept) -> torch.Tensor:
        """A value as the tensor that a kind asks for."""
        if value is None:  # an early result that was not filled: never read
            return torch.zeros(kind.size, dtype=kind.dtype, device=kind.device)
        if not isinstance(value, torch.Tensor):
            return torch.full((), value, dtype=kind.dtype, device=kind.device)
        inside = self.region.operand(value)
        with self.numbers.plainly():
            return (
                inside
                if inside.dtype == kind.dtype and inside.device == kind.device
                else inside.to(kind.device, kind.dtype)
            )

    def _rebuilt(self, flat: Sequence[torch.Tensor], kinds: Sequence[Nest], slots: Sequence[Any]) -> list[Any]:
        wanted = [kind for nest in kinds for kind in nest.leaves if isinstance(kind, Kept)]
        marked = [self.numbers.mark(t) if kind.number else t for t, kind in zip(flat, wanted, strict=True)]
        return _join.rebuild(marked, kinds, slots)

    def _adopted(self, values: list[Any]) -> list[Any]:
        for value in values:
            self.region.adopt(pytree.tree_leaves(value))
            self.fresh(value)
        return values

    def fresh(self, value: Any) -> Any:
        """Note Python containers as made here, where they may be changed; the value comes back."""
        if isinstance(value, list | dict | set | tuple):
            self.region.fresh[id(value)] = value
            for part in value.values() if isinstance(value, dict) else value:
                self.fresh(part)
        return value

    def _joined(self, name: str, one: Nest, other: Nest, site: Site, where: str) -> Nest:
        try:
            return _join.join(one, other)
        except CannotJoin as e:
            what = "the result" if name == "result_" or not name.isidentifier() else f"{name!r}"
            raise site.refuse(f"{where} must leave {what} alike, but {e}") from None

    def _refuse_changes(self, region: Region, site: Site, where: str) -> None:
        if any(version(inside) for _, inside in region.operands.values()):
            raise site.refuse(
                f"{where} changes a tensor from outside in place, which a graph cannot keep. Assign a new value to a "
                "local variable instead: y = y + 1."
            )

    def _outer(self, regions: Sequence[Region]) -> list[torch.Tensor]:
        """The outside tensors that some regions use, and for each free size a tensor that has it."""
        outer = {key: tensor for region in regions for key, (tensor, _) in region.operands.items()}
        known = {str(n) for t in outer.values() for n in t.shape}
        for region in regions:
            for text, size in region.symbols.items():
                free = {str(s) for s in size.node.expr.free_symbols}
                if text in known or free <= known:
                    continue
                for tensor in self.root().inputs:
                    if free & {str(n) for n in tensor.shape}:
                        outer[id(tensor)] = tensor
        return list(outer.values())

    def root(self) -> Region:
        """The whole function's region."""
        region = self.region
        while region.parent is not None:
            region = region.parent
        return region

    def _count(self, kind: str) -> None:
        if not self.region.dry:
            self.kept[kind] = self.kept.get(kind, 0) + 1

    # --- loops

    def loop(
        self, test: Branch, body: Branch, state: Sequence[Any], names: Sequence[str], site: Site
    ) -> tuple[Any, ...]:
        """`while test(*state): state = body(*state)` with a test that is a tensor."""
        where = "a loop that a tensor ends"
        kinds, regions = self._settle(test, body, state, names, site)
        outer = self._outer(regions)
        extra = self.region.resolve(outer)
        slots = [v if k is _join.EMPTY else None for v, k in zip(state, kinds)]
        carried = [t.contiguous() for t in _join.tensors(state, kinds, self.made)]
        if not carried:
            raise site.refuse(f"{where} changes nothing that its test depends on, so it runs never or forever.")
        self._count("while_loop")
        if self.region.dry:
            return tuple(self._adopted(_join.rebuild(self._likes(kinds), kinds, slots)))

        def run(function: Branch, finish: Callable[[Any, Region], Any]) -> Branch:
            def inner(*operands: torch.Tensor) -> Any:
                region = Region(self.region, dry=False, numbers=self.numbers, closed=True)
                region.standing = list(operands[: len(carried)])
                region.inside |= {id(t) for t in region.standing}
                for tensor, operand in zip(outer, operands[len(carried) :]):
                    region.place(tensor, operand)
                with self._inside(region):
                    return finish(function(*self._rebuilt(region.standing, kinds, slots)), region)

            return inner

        def tested(value: Any, region: Region) -> torch.Tensor:
            return self._outputs([value], [Nest((Kept((), torch.bool, value.device, False),), _LEAF)], region)[0]

        functions = run(test, tested), run(body, lambda values, region: self._outputs(values, kinds, region))
        with self.region.paused():
            results = while_loop_op(functions[0], functions[1], tuple(carried), tuple(extra))  # type: ignore[arg-type]
        return tuple(self._adopted(self._rebuilt(results, kinds, slots)))

    def _settle(
        self, test: Branch, body: Branch, state: Sequence[Any], names: Sequence[str], site: Site
    ) -> tuple[list[Nest], list[Region]]:
        """What kind of value each variable of a loop holds whenever its test is reached."""
        where = "every turn of a loop that a tensor ends"
        kinds = [_join.describe(value, self.numbers) for value in state]
        for _ in range(_ROUNDS):
            likes = self._likes(kinds)
            values, ran = self.probe(body, _join.rebuild(likes, kinds, state), likes)
            after = [_join.describe(value, self.numbers) for value in values]
            joined = [self._joined(n, a, b, site, where) for n, a, b in zip(names, kinds, after)]
            if joined == kinds:
                break
            kinds = joined
        self._refuse_changes(ran, site, where)
        if any(version(t) for t in likes):
            raise site.refuse("a loop that a tensor ends changes a variable in place through another name.")
        likes = self._likes(kinds)
        _, tested = self.probe(test, _join.rebuild(likes, kinds, state), likes)
        return kinds, [tested, ran]


_LEAF = pytree.tree_flatten(0)[1]
_CURRENT: ContextVar[Tracing | None] = ContextVar("tracing", default=None)


def current() -> Tracing:
    """The capture that is running."""
    found = _CURRENT.get()
    assert found is not None, "rewritten functions run during a capture only"
    return found


@contextmanager
def running(tracing: Tracing) -> Iterator[None]:
    """Make a capture the current one."""
    token = _CURRENT.set(tracing)
    try:
        with tracing.region:
            yield
    finally:
        _CURRENT.reset(token)


def is_undefined(value: Any) -> bool:
    """Whether a value is that of a name without one."""
    return isinstance(value, Undefined)
