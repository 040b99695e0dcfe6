"""What every engine must keep to, as one call: `check_engine("mine").ok`. Built-ins and third parties pass the same.

Knows engines by the registry only. An engine that takes quantised programs may have a method
`integer_kernels(folder) -> int`, how many products and convolutions of a compiled program are done in integers;
then it must do them all so, because a quantised program computed in floats is right and gains nothing.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.utils._pytree as pytree
from torch import nn

from ..core import Report
from ..graph import Program, capture, float64_module, to_float64
from ..measure import compare
from ._race import ERROR_FLOOR, ERROR_MULTIPLE
from .base import ENGINES, Engine, Runner, compile_program

_BATCHES = (1, 3, 0)
_q = torch.ops.quantized_decomposed
#: Largest difference from a quantised program, relative to the largest output: a few steps of 8 bits.
QUANTISED_ERROR = 0.05


def check_engine(name: str, *, device: str = "cpu") -> Report:
    """Run an engine on four small models and check its answers and its manners.

    The models: a residual CNN, a perceptron with a mapping of outputs (one of them None), and an embedding with
    integer inputs and a dynamic length. Checked on each: answers against float64 within the tolerance of the race, for
    batches of 1, 3 and 0; the same call twice; inputs that are views with gaps; calls from two threads; inputs and
    weights left as they were. The fourth is a quantised CNN: answers against the program, and integer kernels.

    Args:
        device: where the models are; "cuda" for the engines that run there.

    Raises:
        PluginError: no such engine.

    Example:
        >>> check_engine("eager").ok
        True
    """
    engine: Engine = ENGINES.get(name)()
    report = Report(f"conformance of the engine {name!r}")
    report.check("name", getattr(engine, "name", None) == name, f"{getattr(engine, 'name', None)!r}")
    report.check("portable", isinstance(getattr(engine, "portable", None), bool), "says whether its result needs torch")
    reason = engine.unavailable()
    if not report.check("unavailable", isinstance(reason, str), f"a text, empty if it can run: {reason!r}"):
        return report
    if reason:
        report.skip("all models", reason)
        return report
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for title, make in _MODELS.items():
            _check_model(engine, title, *_placed(make, device), report)
        _check_quantised(engine, device, report)
    return report


class _Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(image)))
        x = torch.relu(x + self.second(x))
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


class _Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, Any]:
        y = torch.tanh(self.body(x + shift))
        return {"scores": self.a(y), "nothing": None, "pair": (self.b(y), y.argmax(-1))}


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids)) * mask.unsqueeze(-1)
        result: torch.Tensor = self.out(x.sum(1) / mask.sum(1, keepdim=True).clamp_min(1))
        return result


Inputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def _cnn() -> tuple[Program, Inputs]:
    def inputs(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(n, 3, 8, 8),), {}

    return capture(_Cnn(), inputs(2)[0], name="cnn"), inputs


def _outputs() -> tuple[Program, Inputs]:
    def inputs(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"x": torch.randn(n, 6), "shift": torch.randn(n, 6)}

    return capture(_Outputs(), inputs(2)[1], name="outputs"), inputs


def _words() -> tuple[Program, Inputs]:
    def inputs(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randint(0, 20, (n, 5 + n)), torch.ones(n, 5 + n)), {}

    axes = {0: "batch", 1: "sequence"}
    return capture(_Words(), inputs(2)[0], dynamic_shapes={"ids": axes, "mask": axes}, name="words"), inputs


_MODELS: dict[str, Callable[[], tuple[Program, Inputs]]] = {"cnn": _cnn, "outputs": _outputs, "words": _words}


def _placed(make: Callable[[], tuple[Program, Inputs]], device: str) -> tuple[Program, Inputs]:
    with _on(device):
        program, inputs = make()

    def placed(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        with _on(device):
            return inputs(n)

    return program, placed


def _on(device: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


def _check_model(engine: Engine, title: str, program: Program, inputs: Inputs, report: Report) -> None:
    reason = engine.unsupported(program)
    if not report.check(f"{title}: unsupported", isinstance(reason, str), f"a text, empty if it can: {reason!r}"):
        return
    if reason:
        report.skip(title, reason)
        return
    weights = copy.deepcopy(dict(program.exported.state_dict))
    try:
        runner = compile_program(engine, program)
    except Exception as e:  # whatever a third party's engine raises is the finding
        report.check(f"{title}: compiles", False, f"{type(e).__name__}: {str(e)[:300]}")
        return
    for batch in _BATCHES:
        _attempt(report, f"{title}: answers, batch {batch}", _answers, runner, program, inputs(batch))
    for what, check in _MANNERS.items():
        _attempt(report, f"{title}: {what}", check, runner, pytree.tree_leaves(inputs(3)))
    now = program.exported.state_dict
    same = all(torch.equal(v, now[k]) for k, v in weights.items())
    report.check(f"{title}: weights left alone", same, "bit by bit")


def _attempt(report: Report, what: str, check: Callable[..., tuple[bool, str]], *arguments: Any) -> None:
    try:
        with torch.no_grad():
            passed, detail = check(*arguments)
    except Exception as e:  # as above
        passed, detail = False, f"{type(e).__name__}: {str(e)[:300]}"
    report.check(what, passed, detail)


def _answers(runner: Runner, program: Program, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[bool, str]:
    args, kwargs = inputs
    wide_args, wide_kwargs = to_float64(inputs)
    reference = _arrays(pytree.tree_leaves(float64_module(program)(*wide_args, **wide_kwargs)))
    eager = pytree.tree_leaves(program(*args, **kwargs))
    types = [v.dtype for v in eager if isinstance(v, torch.Tensor)]
    own = compare(reference, _arrays(eager)).max_rel
    allowed = max(ERROR_MULTIPLE * own, ERROR_FLOOR)
    outputs = runner(pytree.tree_leaves(inputs))
    if not all(isinstance(v, torch.Tensor) for v in outputs) or [v.dtype for v in outputs] != types:
        return False, f"types {[getattr(v, 'dtype', type(v).__name__) for v in outputs]}, expected {types}"
    error = compare(reference, _arrays(outputs)).max_rel
    return error <= allowed, f"error {error:.1e} against float64, allowed {allowed:.1e}"


def _arrays(values: Any) -> list[Any]:
    return [v.detach().cpu().double().numpy() for v in values if isinstance(v, torch.Tensor)]


def _repeats(runner: Runner, leaves: list[Any]) -> tuple[bool, str]:
    # The first answer is copied: a runner that hands out its own buffer would overwrite it, which is checked as well.
    first = runner(leaves)
    kept = [v.clone() for v in first]
    other = [v.flip(0) if isinstance(v, torch.Tensor) else v for v in leaves]
    runner(other)
    untouched = all(torch.equal(a, b) for a, b in zip(first, kept))
    again = runner(leaves)
    same = all(torch.equal(a, b) for a, b in zip(kept, again))
    return same and untouched, "bit by bit; earlier answers stay as they were"


def _threads(runner: Runner, leaves: list[Any]) -> tuple[bool, str]:
    other = [v.flip(0) if isinstance(v, torch.Tensor) else v for v in leaves]
    jobs = [leaves, other]
    alone = [[v.clone() for v in runner(job)] for job in jobs]
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    if not all(torch.equal(a, b) for a, b in zip(alone[number], runner(jobs[number]))):
                        wrong.append("another answer than alone")
        except Exception as e:  # must reach the report, not the thread's standard error
            wrong.append(f"{type(e).__name__}: {e}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return not wrong, wrong[0][:300] if wrong else "40 calls, the same answers as alone"


def _leaves_inputs(runner: Runner, leaves: list[Any]) -> tuple[bool, str]:
    kept = [v.clone() if isinstance(v, torch.Tensor) else v for v in leaves]
    outputs = runner(leaves)
    for value in outputs:
        value.add_(1)
    same = all(torch.equal(a, b) for a, b in zip(kept, leaves) if isinstance(a, torch.Tensor))
    return same, "bit by bit, also after the answers were changed in place"


def _takes_views(runner: Runner, leaves: list[Any]) -> tuple[bool, str]:
    # Each value in the middle of a larger tensor, every second one of its last dimension.
    views = [torch.stack([v, v + 1], -1).flatten(-2)[..., ::2] if isinstance(v, torch.Tensor) else v for v in leaves]
    same = all(torch.equal(a, b) for a, b in zip(runner(leaves), runner(views), strict=True))
    return same, "the answers for contiguous inputs, bit by bit"


_MANNERS: dict[str, Callable[[Runner, list[Any]], tuple[bool, str]]] = {
    "twice the same": _repeats,
    "views as inputs": _takes_views,
    "two threads": _threads,
    "inputs left alone": _leaves_inputs,
}


class _Quantised(nn.Module):
    """A residual CNN in the neutral form: int8 weights by channel, int8 activations by tensor; 3 layers of weights."""

    LAYERS = 3

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("first", (8, 3, 3, 3)), ("second", (8, 8, 3, 3)), ("head", (5, 8))):
            self.register_buffer(f"{name}_weight", torch.randint(-127, 128, shape, dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.rand(shape[0]) * 1e-3 + 1e-3)
            self.register_buffer(f"{name}_zero", torch.zeros(shape[0], dtype=torch.int8))
            self.register_buffer(f"{name}_bias", torch.randn(shape[0]) * 0.1)

    def _layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        stored = (getattr(self, f"{name}_{part}") for part in ("weight", "scale", "zero"))
        return _q.dequantize_per_channel(*stored, 0, -127, 127, torch.int8), getattr(self, f"{name}_bias")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = _pair(image, 0.03, 3)
        x = _pair(torch.relu(nn.functional.conv2d(x, *self._layer("first"), padding=1)), 0.02, -128)
        y = _pair(nn.functional.conv2d(x, *self._layer("second"), padding=1), 0.04, -5)
        x = _pair(torch.relu(x + y), 0.03, -128)
        x = _pair(x.mean((2, 3)), 0.02, -128)
        return nn.functional.linear(x, *self._layer("head"))


def _pair(value: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    limits = (scale, zero, -128, 127, torch.int8)
    found: torch.Tensor = _q.dequantize_per_tensor(_q.quantize_per_tensor(value, *limits), *limits)
    return found


def _check_quantised(engine: Engine, device: str, report: Report) -> None:
    with _on(device):
        program = replace(capture(_Quantised(), torch.randn(2, 3, 8, 8), name="quantised"), precision="int8")
        images = {batch: torch.randn(batch, 3, 8, 8) for batch in _BATCHES}
    if reason := engine.unsupported(program):
        report.skip("quantised", reason)
        return
    with tempfile.TemporaryDirectory(prefix="deepseek-r1-", ignore_cleanup_errors=True) as folder:
        try:
            engine.build(program, Path(folder), "int8")
            count = getattr(engine, "integer_kernels", lambda _: None)(Path(folder))
            runner = engine.open(Path(folder), lambda: program)
        except Exception as e:  # as for the other models
            report.check("quantised: compiles", False, f"{type(e).__name__}: {str(e)[:300]}")
            return
    for batch, image in images.items():
        _attempt(report, f"quantised: answers, batch {batch}", _near, runner, program, image)
    if count is None:
        report.note(f"{engine.name} does not say how many of its kernels compute in integers")
    else:
        detail = f"{count} of {_Quantised.LAYERS} layers"
        report.check("quantised: integer kernels", count == _Quantised.LAYERS, detail)


def _near(runner: Runner, program: Program, image: torch.Tensor) -> tuple[bool, str]:
    """Engines round at other places than the program, so that single steps of a scale differ."""
    (answer,), expected = runner([image]), program(image)
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False, f"{answer.dtype} {tuple(answer.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    error = compare(_arrays([expected]), _arrays([answer])).max_rel if image.shape[0] else 0.0
    return error <= QUANTISED_ERROR, f"error {error:.1e} against the program, allowed {QUANTISED_ERROR:.0e}"
