"""The conformance suite, on the built-in engines and on third-party ones good and bad."""

import time

import pytest
import torch
import torch.utils._pytree as pytree

from deepseek_r1.core import PluginError
from deepseek_r1.engines import ENGINES
from deepseek_r1.engines._eager import EagerEngine
from deepseek_r1.engines.conformance import check_engine


class Third(EagerEngine):
    """An engine as a third party would write one: its own class, nothing inherited that matters."""

    name = "third"
    portable = True

    def open(self, folder, program):
        module = program().module()
        _, tree = pytree.tree_flatten(program().example_inputs)

        def run(leaves):
            args, kwargs = pytree.tree_unflatten(list(leaves), tree)
            return [v for v in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(v, torch.Tensor)]

        return run


@pytest.fixture
def registered():
    """Registers an engine's class for one test."""
    names = []

    def register(cls):
        ENGINES.register(cls.name, cls)
        names.append(cls.name)
        return cls.name

    yield register
    for name in names:
        ENGINES.unregister(name)


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_built_in_engines_conform(name):
    report = check_engine(name)
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    assert len(report.checks) == (33 if name == "eager" else 34)
    assert not report.skipped


def test_a_third_partys_engine_conforms(registered):
    assert check_engine(registered(Third)).ok


def test_the_null_engine_fails_on_answers_alone():
    failed = {c.name for c in check_engine("null").failed}
    assert failed == {f"{m}: answers, batch {n}" for m in ("cnn", "outputs", "words", "quantised") for n in (1, 3)}


def wrapped(change):
    class Bad(Third):
        name = "bad"

        def open(self, folder, program):
            return change(super().open(folder, program), program())

    return Bad


def wrong(run, program):
    return lambda leaves: [v + 1e-2 if v.is_floating_point() else v for v in run(leaves)]


def one_buffer(run, program):
    kept = {}

    def call(leaves):
        outputs = run(leaves)
        for i, v in enumerate(outputs):
            if v.shape == getattr(kept.get(i), "shape", None):
                kept[i].copy_(v)
            else:
                kept[i] = v.clone()
        return [kept[i] for i in range(len(outputs))]

    return call


def changes_inputs(run, program):
    def call(leaves):
        outputs = run(leaves)
        for leaf in leaves:
            leaf.zero_()
        return outputs

    return call


def changes_weights(run, program):
    with torch.no_grad():
        next(iter(program.exported.state_dict.values())).mul_(2)
    return run


def not_for_threads(run, program):
    state = {}

    def call(leaves):
        state["leaves"] = leaves
        time.sleep(0.001)
        return run(state["leaves"])

    return call


def reads_memory_in_order(run, program):
    return lambda leaves: run([v.as_strided(v.shape, torch.empty(v.shape).stride()) for v in leaves])


def fixed_batch(run, program):
    size = []

    def call(leaves):
        size.append(leaves[0].shape[0])
        if size[-1] != size[0]:
            raise RuntimeError("one batch size only")
        return run(leaves)

    return call


def random(run, program):
    return lambda leaves: [v + torch.rand(()) * 1e-6 if v.is_floating_point() else v for v in run(leaves)]


def no_list(run, program):
    return lambda leaves: [v.numpy() for v in run(leaves)]


def crashes(run, program):
    raise RuntimeError("cannot compile")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (wrong, "answers, batch 3"),
        (one_buffer, "twice the same"),
        (changes_inputs, "inputs left alone"),
        (changes_weights, "weights left alone"),
        (not_for_threads, "two threads"),
        (reads_memory_in_order, "views as inputs"),
        (fixed_batch, "answers, batch 0"),
        (random, "twice the same"),
        (no_list, "answers, batch 1"),
        (crashes, "compiles"),
    ],
)
def test_each_kind_of_misbehaviour_is_named(registered, change, expected):
    failed = {c.name for c in check_engine(registered(wrapped(change))).failed}
    assert f"cnn: {expected}" in failed


@pytest.mark.parametrize("count", [0, 2, 3])
def test_integer_kernels_are_counted(registered, count):
    class Counting(Third):
        name = "counting"

        def integer_kernels(self, folder):
            return count

    failed = [(c.name, c.detail) for c in check_engine(registered(Counting)).failed]
    assert failed == ([] if count == 3 else [("quantised: integer kernels", f"{count} of 3 layers")])


def test_engines_that_cannot_run_say_so(registered):
    class Absent(Third):
        name = "absent"

        def unavailable(self):
            return "no such hardware"

    class Silent(Third):
        name = "silent"

        def unavailable(self):
            return None

    class Narrow(Third):
        name = "narrow"

        def unsupported(self, program):
            return f"no {program.name}" if program.name in ("words", "quantised") else ""

    report = check_engine(registered(Absent))
    assert report.ok
    assert report.skipped == [("all models", "no such hardware")]
    assert [c.name for c in check_engine(registered(Silent)).failed] == ["unavailable"]
    report = check_engine(registered(Narrow))
    assert report.ok
    assert report.skipped == [("words", "no words"), ("quantised", "no quantised")]
    with pytest.raises(PluginError, match="unknown engine 'nowhere'"):
        check_engine("nowhere")
