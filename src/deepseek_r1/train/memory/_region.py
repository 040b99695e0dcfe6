"""Recomputation: a region is one or more calls of modules whose saved tensors are dropped and computed again.

The tensors that autograd wants to save are replaced by place-holders (`saved_tensors_hooks`); the first place-holder
that the backward pass opens runs the region's calls again from their saved inputs, with the same random numbers, the
same autocast state and the same buffers, and fills all of them. Knows no plan and no model, only calls.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...core import InputError
from ._intercept import undisturbed
from ._partial import is_compiled

Buffers = Sequence[tuple[nn.Module, str]]
#: How a region with several groups computes again: all at once, each group alone, or each alone from few stored inputs.
TOGETHER, EACH, TREE = "together", "each", "tree"


class _Stop(Exception):
    """Everything that was asked for is there; the rest of the forward pass is not needed."""


class _Input:
    """Stands for an output of an earlier call of the same region."""

    __slots__ = ("call", "place")

    def __init__(self, call: int, place: int) -> None:
        self.call, self.place = call, place


class _Holder:
    """What autograd keeps instead of a saved tensor."""

    __slots__ = ("__weakref__", "group", "like", "region", "value")

    def __init__(self, region: Region, group: int, tensor: Tensor) -> None:
        self.region, self.group, self.value = region, group, None
        self.like = (tensor.shape, tensor.dtype, tensor.device)

    value: Tensor | None

    def take(self) -> Tensor:
        if self.value is None:
            self.region.fill(self.group)
        value, self.value = self.value, None
        if value is None:
            raise InputError(
                "a tensor that the backward pass needs was not computed again: the block does something else when it "
                "runs a second time. Blocks that depend on outside state cannot be recomputed."
            )
        return value


class _Call:
    """One call of a module: how to run it again."""

    def __init__(self, run: Callable[..., Any], inputs: list[Any], spec: TreeSpec, buffers: Buffers) -> None:
        self.run, self.inputs, self.spec = run, inputs, spec
        self.rng = rng_states(inputs)
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in ("cpu", "cuda")
        ]
        self.buffers = copied(buffers)
        self.versions = [version(leaf) for leaf in inputs]
        self.outputs: list[tuple[weakref.ref[Tensor], int] | None] = []
        self.wants_grad: list[bool] = []

    def forget_unused_rng(self) -> None:
        """Drop the generators' states if the call, which has just ended, drew nothing."""
        now = [(d, torch.get_rng_state() if d.type == "cpu" else torch.cuda.get_rng_state(d)) for d, _ in self.rng]
        if all(torch.equal(before, after) for (_, before), (_, after) in zip(self.rng, now, strict=True)):
            self.rng = []

    @contextlib.contextmanager
    def state(self, cached: bool = True) -> Iterator[None]:
        """Random generators, autocast and buffers as they were at the call.

        Args:
            cached: whether autocast may keep its copies of weights.
        """
        set_rng_states(self.rng)
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled, kept in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    kept = kept and cached
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=kept))
            stack.enter_context(_swapped(self.buffers))
            yield


class _Group:
    """Calls that are filled together, with the place-holders of their saved tensors."""

    def __init__(self, contexts: tuple[Any, Any] | None) -> None:
        self.calls: list[int] = []
        self.holders: list[weakref.ref[_Holder]] = []
        self.forward: Any = contexts[0] if contexts is not None else None
        self.again: Any = contexts[1] if contexts is not None else None


@contextlib.contextmanager
def recorded() -> Iterator[set[int]]:
    """The addresses of the storages that autograd would save in the block; no backward pass can follow."""
    found: set[int] = set()
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> None:
        # Held until the end, so that no address is given away twice.
        alive.append(tensor.detach())
        found.add(tensor.untyped_storage()._cdata)

    with saved_tensors_hooks(undisturbed(pack), _same):
        yield found


class Region:
    """Calls whose saved tensors are computed again in the backward pass.

    Args:
        mode: TOGETHER, EACH or TREE; without effect for a region of one group.
        contexts: two context managers for the forward pass and for the second one (selective checkpointing).

    Example:
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
        >>> y = Region().call(layer, (x,), {})
        >>> y.sum().backward()
        >>> torch.equal(x.grad, layer.weight.sum(0, keepdim=True))
        True
    """

    def __init__(self, mode: str = TOGETHER, contexts: tuple[Any, Any] | None = None) -> None:
        self.mode = mode
        self._contexts = contexts
        self._calls: list[_Call] = []
        self._groups: list[_Group] = []
        #: Stored outputs of calls, by (call, place), while groups are computed again one by one.
        self._stored: dict[tuple[int, int], Tensor] = {}

    def call(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        buffers: Buffers = (),
        new_group: bool = True,
    ) -> Any:
        """Run a module's forward pass as part of the region."""
        leaves, spec = tree_flatten((args, kwargs))
        call = _Call(run, [self._refer(leaf) for leaf in leaves], spec, buffers)
        if new_group or not self._groups:
            self._groups.append(_Group(self._contexts))
        group = self._groups[-1]
        group.calls.append(len(self._calls))
        self._calls.append(call)
        number = len(self._groups) - 1

        def pack(tensor: Tensor) -> Any:
            if static(tensor):
                return tensor
            holder = _Holder(self, number, tensor)
            group.holders.append(weakref.ref(holder))
            return holder

        with group.forward or contextlib.nullcontext(), saved_tensors_hooks(undisturbed(pack), _unpack):
            output = run(*args, **kwargs)
        call.forget_unused_rng()
        found, _ = tree_flatten(output)
        call.outputs = [(weakref.ref(leaf), version(leaf)) if isinstance(leaf, Tensor) else None for leaf in found]
        call.wants_grad = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in found]
        return output

    def keep_changed_buffers(self) -> list[tuple[nn.Module, str]]:
        """Of the last call's buffers, forget the copies of those that the call did not change; gives the others."""
        call = self._calls[-1]
        call.buffers = changed(call.buffers)
        return [(module, name) for module, name, _ in call.buffers]

    def inputs(self, places: Sequence[int]) -> list[Tensor]:
        """The first call's inputs at these places (leaves of its arguments); without places, all with gradients."""
        every = self._calls[0].inputs
        found = [every[place] for place in places] or [t for t in every if isinstance(t, Tensor) and t.requires_grad]
        return [leaf for leaf in found if isinstance(leaf, Tensor)]

    @property
    def compiled(self) -> bool:
        """Whether a call runs through `torch.compile`."""
        return any(is_compiled(call.run) for call in self._calls)

    @property
    def draws(self) -> bool:
        """Whether a call drew random numbers."""
        return any(call.rng for call in self._calls)

    def _refer(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            for number in range(len(self._calls) - 1, -1, -1):
                for place, known in enumerate(self._calls[number].outputs):
                    # Changed in place in between, it is no longer what the earlier call gave.
                    if known is not None and known[0]() is leaf and known[1] == version(leaf):
                        return _Input(number, place)
        return leaf

    def isolated(self, through: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Run the calls again as a graph of its own; gives its inputs and outputs that want a gradient.

        Args:
            through: called as `through(run, args, kwargs, buffers, first)` in place of `run(*args, **kwargs)`.
        """
        twins: dict[int, Any] = {}
        values: dict[tuple[int, int], Any] = {}
        output: Any = None
        for number, call in enumerate(self._calls):
            for leaf in call.inputs:
                if not isinstance(leaf, _Input):
                    twins.setdefault(id(leaf), detached(leaf))
            leaves = [
                values[leaf.call, leaf.place] if isinstance(leaf, _Input) else twins[id(leaf)] for leaf in call.inputs
            ]
            args, kwargs = tree_unflatten(leaves, call.spec)
            # Compiled code keeps no copies in autocast's cache, and would be compiled anew for another setting of it.
            with call.state(cached=self.compiled):
                buffers = [(module, name) for module, name, _ in call.buffers]
                output = through(call.run, args, kwargs, buffers, number == 0)
            found = tree_flatten(output)[0]
            values.update(((number, place), leaf) for place, leaf in enumerate(found))
        inputs = [t for t in twins.values() if isinstance(t, Tensor) and t.requires_grad]
        return inputs, [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad]

    # The second time.

    def fill(self, number: int) -> None:
        """Give the place-holders of a group (of all groups, if the mode is TOGETHER) their tensors."""
        together = self.mode == TOGETHER
        groups = self._groups if together else [self._groups[number]]
        with preserved_rng_states(self._calls[0].inputs), torch.enable_grad():
            if not together:
                self._advance(number)
            values = dict(self._stored)
            for position, group in enumerate(groups):
                self._fill_group(group, values, last=position == len(groups) - 1)
        if not together:
            before = self._groups[number - 1].calls[0] if number else 0
            self._stored = {key: value for key, value in self._stored.items() if key[0] < before}

    def _fill_group(self, group: _Group, values: dict[tuple[int, int], Tensor], last: bool) -> None:
        left = iter(list(group.holders))
        missing = len(group.holders)

        def pack(tensor: Tensor) -> Any:
            nonlocal missing
            if static(tensor):
                return tensor
            reference = next(left, None)
            if reference is None:
                raise _differs("more tensors are saved")
            missing -= 1
            value = tensor.detach()
            holder = reference()
            if holder is not None:
                if holder.like != (tensor.shape, tensor.dtype, tensor.device):
                    raise _differs(f"a tensor {holder.like} became {(tensor.shape, tensor.dtype, tensor.device)}")
                holder.value = value
            if last and missing == 0:
                raise _Stop
            return value

        if last and missing == 0:
            return
        try:
            with group.again or contextlib.nullcontext(), saved_tensors_hooks(undisturbed(pack), _same):
                self._replay(group, values)
        except _Stop:
            return
        if missing:
            raise _differs("fewer tensors are saved")

    def _replay(self, group: _Group, values: dict[tuple[int, int], Tensor]) -> None:
        """Run a group's calls again on detached inputs; their outputs go into `values`, detached in the end."""
        made: dict[tuple[int, int], bool] = {}
        for number in group.calls:
            call = self._calls[number]
            leaves = []
            for leaf, seen in zip(call.inputs, call.versions, strict=True):
                if isinstance(leaf, _Input):
                    leaves.append(values[leaf.call, leaf.place])
                    continue
                if version(leaf) != seen:
                    raise InputError(
                        "the input of a block that is to be recomputed was changed in place after the block had run, "
                        "so it cannot run again on what it was given. Write `x = x + y` for `x += y` there."
                    )
                leaves.append(detached(leaf))
            args, kwargs = tree_unflatten(leaves, call.spec)
            with call.state():
                output = call.run(*args, **kwargs)
            for place, (leaf, wants) in enumerate(zip(tree_flatten(output)[0], call.wants_grad, strict=True)):
                if isinstance(leaf, Tensor):
                    values[number, place] = leaf
                    made[number, place] = wants
        for key, wants in made.items():
            values[key] = values[key].detach().requires_grad_(wants)

    def _advance(self, target: int) -> None:
        """Store what the group `target` takes from the calls before it."""
        start = target
        while self._cut(start, target) - self._stored.keys():
            start -= 1
        while start < target:
            middle = start + 1 if self.mode == EACH else (start + target + 1) // 2
            values = dict(self._stored)
            with dropped():
                for position in range(start, middle):
                    self._replay(self._groups[position], values)
                    needed = self._cut(position + 1, target)
                    values = {k: v for k, v in values.items() if k in needed}
            self._stored.update(values)
            start = middle

    def _cut(self, group: int, target: int) -> set[tuple[int, int]]:
        """Outputs of calls before `group` that the groups from it to `target` take."""
        first = self._groups[group].calls[0]
        needed = set()
        for member in self._groups[group : target + 1]:
            for number in member.calls:
                for leaf in self._calls[number].inputs:
                    if isinstance(leaf, _Input) and leaf.call < first:
                        needed.add((leaf.call, leaf.place))
        return needed


def _unpack(packed: Any) -> Tensor:
    return packed.take() if isinstance(packed, _Holder) else packed


def _same(value: Any) -> Any:
    return value


def _nothing(_: Tensor) -> None:
    return None


def dropped() -> saved_tensors_hooks:
    """A context in which autograd saves nothing; no backward pass can follow."""
    return saved_tensors_hooks(undisturbed(_nothing), _same)


def static(tensor: Tensor) -> bool:
    """Parameters and views of them live anyway."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def detached(leaf: Any) -> Any:
    """A leaf that begins a graph of its own, with the same wish for a gradient; other values as they are."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def version(leaf: Any) -> int:
    """How often a tensor was changed in place; 0 for what does not count it."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _differs(how: str) -> InputError:
    return InputError(
        f"a block did something else when it ran a second time ({how}). Blocks whose path or shapes depend on outside "
        "state (a cache that grows, a random choice outside torch) cannot be recomputed; leave them out of the budget."
    )


def copied(buffers: Buffers) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers with a copy of what they hold."""
    found = ((module, name, module._buffers.get(name)) for module, name in buffers)
    return [(module, name, value.clone()) for module, name, value in found if value is not None]


def changed(copies: Sequence[tuple[nn.Module, str, Tensor]]) -> list[tuple[nn.Module, str, Tensor]]:
    """Of buffers with their copies, those that hold something else now."""
    now = [(module._buffers[name], before) for module, name, before in copies]
    same = [value is not None and torch.equal(value, before) for value, before in now]
    return [entry for entry, kept in zip(copies, same, strict=True) if not kept]


@contextlib.contextmanager
def _swapped(buffers: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Modules with these buffers instead of their own: running statistics count a batch once."""
    own = [(module, name, module._buffers[name]) for module, name, _ in buffers]
    try:
        # Not an operator of the block, for those who watch its operators.
        with _disable_current_modes():
            for module, name, value in buffers:
                module._buffers[name] = value.clone()
        yield
    finally:
        for module, name, before in own:
            module._buffers[name] = before


def rng_states(values: Any) -> list[tuple[torch.device, Tensor]]:
    """The states of the generators that a call with these inputs may draw from; none while a CUDA graph is recorded."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return []
    devices = {t.device for t in values if isinstance(t, Tensor) and t.device.type == "cuda"}
    if not devices and torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = {torch.device("cuda", torch.cuda.current_device())}
    states = [(torch.device("cpu"), torch.get_rng_state())]
    return states + [(device, torch.cuda.get_rng_state(device)) for device in sorted(devices, key=str)]


def set_rng_states(states: Sequence[tuple[torch.device, Tensor]]) -> None:
    """Put generators back to states from `rng_states`."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def preserved_rng_states(values: Any = ()) -> Iterator[None]:
    """The generators as they were before the block."""
    states = rng_states(values)
    try:
        yield
    finally:
        set_rng_states(states)
