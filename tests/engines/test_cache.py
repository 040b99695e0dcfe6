"""The cache of choices: what is found again, what makes a choice stale, what is damaged, and two writers at once."""

import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import deepseek_r1 as dr1
from deepseek_r1.core import ArtifactError, Budget, ConfigError, Report
from deepseek_r1.engines import ENGINES, ChoiceCache, RaceConfig, _optimize, _rungs, optimize
from deepseek_r1.engines._fingerprint import Fingerprint, NoFingerprint
from deepseek_r1.graph import capture
from deepseek_r1.measure import paired_turns

X = torch.randn(4, 16)


@pytest.fixture(autouse=True)
def _sure_races(monkeypatch):
    """ONNX Runtime wins by decree and machines are quiet: what is kept is tested here, not who is fast."""

    def turns(rivals, **_):
        slow = lambda turn: lambda settle, calls: turn(settle, 1) + 1.0  # noqa: E731
        handicapped = {n: slow(t) if n.startswith("eager") else t for n, t in rivals.items()}
        return paired_turns(handicapped, rounds=20, pause_s=0, settle_s=0, min_round_s=0)

    monkeypatch.setattr(_rungs, "paired_turns", turns)


@pytest.fixture
def cache(tmp_path):
    return ChoiceCache(tmp_path / "choices")


@pytest.fixture
def run(cache):
    settings = RaceConfig(isolated=False, cache=cache.root)
    return functools.partial(optimize, engines=["onnxruntime"], race=settings)


def net(seed=0, width=32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def cached(executable):
    return any(note.startswith("from the cache; raced on") for note in executable.report.notes)


def test_the_second_time_nothing_is_captured_or_raced(run, cache, monkeypatch):
    first = run(net(), example_inputs=X)
    assert first.engine == "onnxruntime"
    assert not cached(first)
    for name in ("capture", "run_race"):
        monkeypatch.setattr(_optimize, name, lambda *a, **k: pytest.fail("done again"))
    model = net()
    again = run(model, example_inputs=torch.randn(4, 16))
    assert cached(again)
    assert (again.engine, again.precision) == ("onnxruntime", "fp32")
    assert "latency, onnxruntime fp32" in again.report
    for rows in (4, 1, 0, 7):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(again(x), model(x))
    with pytest.raises(dr1.DeepSeekError, match="shape"):
        again(torch.randn(4, 15))
    (entry,) = cache.entries()
    assert (entry.model, entry.engine, entry.source) == ("Sequential", "onnxruntime", "own")
    assert entry.bytes > 1000


def test_weights_that_change_later_are_noticed_in_a_cached_executable(run):
    run(net(), example_inputs=X)
    model = net()
    again = run(model, example_inputs=X)
    assert cached(again)
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.testing.assert_close(again(X), model(X))
    assert any("compiled again" in note for note in again.report.notes)
    assert again.program.name == "Sequential"


@pytest.mark.parametrize(
    "change",
    [
        lambda m, k: (m[0].weight.data.add_(1e-3), k),
        lambda m, k: (m.train(), k),
        lambda m, k: (m.register_forward_hook(lambda *a: None), k),
        lambda m, k: (setattr(m[1], "inplace", True), k),
        lambda m, k: (m.append(nn.ReLU()), k),
        lambda m, k: (None, {**k, "example_inputs": X[:2]}),
        lambda m, k: (None, {**k, "budget": Budget(size_mb=10)}),
        lambda m, k: (None, {**k, "engines": ["onnxruntime", "eager"]}),
        lambda m, k: (None, {**k, "dataset": [(X, torch.zeros(4, dtype=torch.int64))]}),
    ],
)
def test_what_makes_another_choice(run, change):
    assert not cached(run(net(), example_inputs=X))
    assert cached(run(net(), example_inputs=X))
    model = net()
    _, changed = change(model, {"example_inputs": X})
    assert not cached(run(model, **changed))
    assert cached(run(model, **changed))


def test_other_passes_are_another_choice(run, monkeypatch):
    run(net(), example_inputs=X)
    few = functools.partial(run, race=replace(run.keywords["race"], passes=("remove_identities",)))
    assert not cached(few(net(), example_inputs=X))
    model = net()
    again = few(model, example_inputs=X)
    assert cached(again)
    used = []
    monkeypatch.setattr(
        "deepseek_r1.engines.executable.simplify", lambda program, passes, **_: used.append(passes) or program
    )
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.testing.assert_close(again(X), model(X))
    assert used == [("remove_identities",)], "what is compiled again is simplified as it was"


class Product(nn.Module):
    """A matrix product that a pass makes a linear layer with weights of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 347))

    def forward(self, x):
        return torch.relu(x @ self.weight)


def test_an_executable_does_not_hold_the_weights_that_passes_rewrote(run):
    def alive():
        gc.collect()
        return sum(type(v) is torch.Tensor and v.shape == (347, 16) for v in gc.get_objects())

    model, before = Product(), alive()
    # Built in a child, because the exporter's optimiser keeps what it matched last.
    fast = run(model, example_inputs=X, race=replace(run.keywords["race"], isolated=True))
    assert fast.engine == "onnxruntime"
    assert any(row.metric == "pass name_linears" for section in fast.report.sections for row in section.rows)
    assert alive() == before
    with torch.no_grad():
        model.weight.mul_(2)
    for x in (X, X[:0]):
        torch.testing.assert_close(fast(x), model(x))


def test_another_thread_count_is_another_choice(run):
    run(net(), example_inputs=X)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert not cached(run(net(), example_inputs=X))
    finally:
        torch.set_num_threads(threads)


def test_a_changed_source_is_another_choice(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cached_scale.py").write_text("def scale(x):\n    return x * 2.0\n")
    text = """
        import torch
        from cached_scale import scale
        class Net(torch.nn.Module):
            def forward(self, x):
                return scale(x)
    """
    (tmp_path / "cached_model.py").write_text(textwrap.dedent(text))
    modules = [importlib.import_module(name) for name in ("cached_scale", "cached_model")]
    assert torch.equal(run(modules[1].Net(), example_inputs=X)(X), X * 2)
    assert cached(run(modules[1].Net(), example_inputs=X))
    # The model's own file is as it was; the one it imports is not.
    (tmp_path / "cached_scale.py").write_text("def scale(x):\n    return x * 3.00\n")
    os.utime(tmp_path / "cached_scale.py", (0, 0))
    for module in modules:
        importlib.reload(module)
    again = run(modules[1].Net(), example_inputs=X)
    assert not cached(again)
    torch.testing.assert_close(again(X), X * 3)


def test_programs_and_quantised_programs(run):
    program = capture(net(), X)
    assert not cached(run(program))
    again = run(capture(net(), X))
    assert cached(again)
    torch.testing.assert_close(again(X), program(X))
    small = dr1.quantize(net(), dataset=[X, X + 1])
    batches = [X] * 4
    first = run(small, dataset=batches, budget=Budget(accuracy_drop=1.0))
    second = run(small, dataset=batches, budget=Budget(accuracy_drop=1.0))
    assert cached(second)
    assert second.precision == first.precision
    torch.testing.assert_close(second(X), first(X))


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "extra", "json", "later", "signature"])
def test_a_damaged_entry_is_discarded_and_built_again(run, cache, damage):
    run(net(), example_inputs=X)
    (entry,) = cache.entries()
    model = entry.files / "model.onnx"
    data = model.read_bytes()
    about = json.loads((entry.folder / "entry.json").read_text())
    if damage == "cut":
        model.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        model.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "missing":
        model.unlink()
    elif damage == "extra":
        (entry.files / "more").write_text("?")
    elif damage == "json":
        (entry.folder / "entry.json").write_text("{")
    else:
        about |= {"schema_version": 99} if damage == "later" else {"signature": "[]"}
        (entry.folder / "entry.json").write_text(json.dumps(about))
    again = run(net(), example_inputs=X)
    assert not cached(again)
    assert any(n.startswith("a damaged entry of the cache was discarded") for n in again.report.notes)
    torch.testing.assert_close(again(X), net()(X))
    assert cached(run(net(), example_inputs=X))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users on this system")
def test_compiled_files_of_another_user_are_not_opened(run, cache, monkeypatch):
    run(net(), example_inputs=X)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ArtifactError, match="belongs to another user"):
        cache.find(cache._folders()[0].name)


def test_what_cannot_be_kept_is_said(run, cache):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.random = torch.Generator()

        def forward(self, x):
            return x * 2

    fast = run(Odd(), example_inputs=X)
    assert any(
        "nothing is kept in the cache: Odd.random is a torch" in note and "Generator" in note
        for note in fast.report.notes
    )
    from deepseek_r1.engines._onnxruntime import OnnxRuntimeEngine

    ENGINES.register("mine", type("Mine", (OnnxRuntimeEngine,), {"name": "mine"}))
    try:
        fast = run(net(), example_inputs=X, engines=["mine"])
        assert any("mine: registered in this process only" in note for note in fast.report.notes)
    finally:
        ENGINES.unregister("mine")
    assert cache.entries() == []
    assert run(net(), example_inputs=X, race=RaceConfig(cache=False, isolated=False)).engine == "onnxruntime"
    assert cache.entries() == []


def test_a_home_that_cannot_be_written_costs_a_note(run, tmp_path):
    (tmp_path / "file").write_text("")
    fast = run(net(), example_inputs=X, race=RaceConfig(isolated=False, cache=tmp_path / "file" / "below"))
    assert fast.engine == "onnxruntime"
    assert any("could not be kept in the cache" in note for note in fast.report.notes)


def test_the_least_recently_used_leave_first(run, cache):
    for seed in range(3):
        run(net(seed), example_inputs=X)
        time.sleep(0.02)
    oldest = cache.entries()[-1]
    assert cached(run(net(0), example_inputs=X)), "used again, so no longer the oldest"
    size = oldest.bytes
    cache.set_limit(int(2.5 * size))
    assert len(cache.entries()) == 2
    assert cached(run(net(0), example_inputs=X))
    assert not cached(run(net(1), example_inputs=X))
    assert len(cache.entries()) == 2
    assert cache.limit_bytes == int(2.5 * size)
    assert cache.clear() == 2
    assert cache.entries() == []
    with pytest.raises(ConfigError, match="0 or more"):
        cache.set_limit(-1)
    assert not list(cache.root.glob(".*-*"))


def test_two_processes_may_write_at_once(cache):
    code = """
        import sys, torch
        from pathlib import Path
        from deepseek_r1.core import Report
        from deepseek_r1.engines import ChoiceCache
        from deepseek_r1.graph import capture
        cache = ChoiceCache(sys.argv[1])
        files = Path(sys.argv[1]).parent / sys.argv[2]
        files.mkdir()
        (files / "data").write_bytes(sys.argv[2].encode() * 1000)
        signature = capture(torch.nn.Linear(2, 2), torch.randn(2, 2)).signature
        for number in range(40):
            key = f"key{number % 4}"
            if number % 7 == 6:
                cache.discard(key)
            try:
                cache.put(key, files, Report("r"), model="m", engine="eager", precision="fp32", source="own",
                          signature=signature)
                found = cache.find(key)
            except Exception as e:
                raise SystemExit(f"{type(e).__name__}: {e}")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(cache.root)]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
    errors = [w.communicate(timeout=120)[1] for w in writers]
    # An entry may vanish under a reader while another process discards it; nothing half may ever stand.
    assert all(w.returncode == 0 or "FileNotFoundError" in e or "lacks" in e for w, e in zip(writers, errors)), errors
    for entry in cache.entries():
        content = (cache.find(entry.folder.name).files / "data").read_bytes()
        assert content in (b"a" * 1000, b"b" * 1000)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def mark(value):
    marks = Fingerprint()
    marks.add(value)
    return marks.hexdigest()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 2), (1, 1.0), ("a", b"a"), ([1, 2], [2, 1]), ([1], (1,)), ({"a": 1}, {"a": 2}),
        (torch.zeros(2), torch.ones(2)),
        (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), torch.zeros(2).half()), ({1, 2}, {1, 3}),
        (functools.partial(max, 1), functools.partial(max, 2)), (torch.float32, torch.float16),
        (torch.eye(3), torch.eye(3)[[1, 0, 2]]), ([[1], []], [[], [1]]),
    ],
)  # fmt: skip
def test_different_values_have_different_fingerprints(a, b):
    assert mark(a) != mark(b)
    assert mark(a) == mark(a)


def test_closures_and_functions_typed_at_a_prompt():
    def make(factor, code):
        space = {"torch": torch, "factor": factor, "__name__": "a_prompt"}
        exec(f"def scale(x):\n    return x * factor {code}", space)
        return space["scale"]

    assert mark(make(2, "+ 1")) == mark(make(2, "+ 1"))
    assert mark(make(2, "+ 1")) != mark(make(3, "+ 1"))
    assert mark(make(2, "+ 1")) != mark(make(2, "- 1"))
    closure = lambda n: lambda x: x * n  # noqa: E731
    assert mark(closure(1)) != mark(closure(2))


def test_what_has_no_fingerprint(tmp_path):
    with (tmp_path / "f").open("w") as file, pytest.raises(NoFingerprint, match=r"value\['a'\]\[1\] is a _io"):
        mark({"a": [1, file]})
    with pytest.raises(NoFingerprint, match="device meta"):
        mark(torch.empty(2, device="meta"))


def test_values_that_hold_themselves():
    a, b = [1], [1]
    a.append(a)
    b.append([1, b])
    assert mark(a) != mark(b)


def test_reports_say_what_a_cache_entry_is(cache, run):
    run(net(), example_inputs=X)
    assert isinstance(cache.entries()[0].report(), Report)
