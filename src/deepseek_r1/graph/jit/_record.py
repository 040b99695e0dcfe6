"""Running the rewritten function while torch.export looks on, and what is learnt from it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor

from ...core import CaptureError
from . import _calls
from ._guards import Guards
from ._join import Undefined
from ._numbers import Numbers
from ._reach import Holder
from ._region import Region
from ._runtime import Runtime
from ._source import Refusal
from ._tracing import Site, Tracing, current, running


class _Whole(Region):
    """The region of the whole function: tensors of enclosing scopes are read as the module that holds them has them."""

    def __init__(self, numbers: Numbers, holder: Holder | None) -> None:
        super().__init__(None, dry=False, numbers=numbers)
        self.holder = holder
        self.differentiable = True

    def outermost(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if self.holder is not None and (name := self.holder.name_of(tensor)) is not None:
            found: torch.Tensor = getattr(self.holder, name)
            return found
        self.differentiable = self.differentiable and not tensor.requires_grad
        return tensor

    def note_grad_switch(self) -> None:
        self.differentiable = False


class Recorder:
    """Runs the rewritten function while torch.export looks on, and keeps what was learnt.

    Attributes:
        target: the user's function or module; `function` is the code behind it, `owner` what that is bound to.
        module: what torch.export captures: the user's module, or the holder of a function.
        guards: the Python values that were read.
        numbers_out: for each leaf of the result, whether it stands for a Python number.
        kept: how many branches and loops there are, by kind.
        differentiable: whether gradients reach every tensor that the function uses.
    """

    def __init__(
        self, target: Callable[..., Any], function: types.FunctionType, owner: Any, signature: inspect.Signature
    ) -> None:
        self.target, self.function, self.owner = target, function, owner
        self.module = target if isinstance(target, torch.nn.Module) else Holder(target)
        self._signature = signature
        self.guards = Guards()
        self.numbers_out: tuple[bool, ...] = ()
        self.kept: dict[str, int] = {}
        self.differentiable = True
        self._patched: list[tuple[torch.nn.Module, Any]] = []
        self._done: set[int] = set()

    @contextmanager
    def installed(self) -> Iterator[torch.nn.Module]:
        """The module to capture: during this, it and the modules it calls run their rewritten forward."""
        module = self.module
        try:
            for part in list(module.modules()):
                if part is not module:
                    self.patch(part)
            self._install(module, self._entry)
            yield module
        finally:
            for part, before in reversed(self._patched):
                if before is None:
                    part.__dict__.pop("forward", None)
                else:
                    part.__dict__["forward"] = before

    def _install(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._done.add(id(module))
        self._patched.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def patch(self, module: torch.nn.Module) -> None:
        """Let a module of the user's run its rewritten forward until the capture is over."""
        if id(module) in self._done:
            return
        self._done.add(id(module))
        original = module.forward
        function, owner = _calls.followed(original)
        if function is None:
            return
        site = Site(function.__code__.co_filename, function.__code__.co_firstlineno, function.__qualname__)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_exporting():
                return original(*args, **kwargs)
            self.guards.reach(owner)
            return _calls.run(current(), function, (owner, *args), kwargs, site, Runtime)

        self._install(module, forward)

    @property
    def _entry(self) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Before it exports, capture runs the module once to see whether it works. What the function changes
            # would be changed twice, so that is left until something fails.
            return self._run(args, kwargs) if torch.compiler.is_exporting() else None

        forward.__signature__ = self._signature  # type: ignore[attr-defined]
        return forward

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function, owner = self.function, self.owner
        code = function.__code__
        site = Site(code.co_filename, code.co_firstlineno, function.__qualname__)
        numbers = Numbers()
        self.guards = Guards()
        whole = _Whole(numbers, self.module if isinstance(self.module, Holder) else None)
        whole.inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        tracing = Tracing(region=whole, numbers=numbers, guards=self.guards, patch=self.patch)
        for value in (owner, *args, *kwargs.values()):
            self.guards.reach(value)
        with running(tracing):
            given = args if owner is None else (owner, *args)
            if isinstance(self.target, functools.partial):
                result = _calls.call(site, Runtime, self.target, args, kwargs)
            else:
                result = _calls.run(tracing, function, given, kwargs, site, Runtime)
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Undefined):
                    raise site.refuse(leaf.message)
            result = pytree.tree_map(lambda v: whole.operand(v) if isinstance(v, torch.Tensor) else v, result)
        self.numbers_out = tuple(v in numbers for v in pytree.tree_leaves(result))
        self.kept = tracing.kept
        self.differentiable = whole.differentiable
        return result


def own_error(error: BaseException) -> CaptureError | None:
    """The refusal of a line behind an error of torch's or capture's."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, Refusal):
        seen = seen.__cause__ or seen.__context__
    return seen
