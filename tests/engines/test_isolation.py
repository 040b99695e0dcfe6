"""Candidates in child processes: what a crash, a hang or hunger for memory costs, and what stays in this process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError
from deepseek_r1.engines import ENGINES, RaceConfig, _process, _rungs, optimize
from deepseek_r1.engines._eager import EagerEngine
from deepseek_r1.engines._process import ChildError, Worker
from deepseek_r1.graph import capture
from deepseek_r1.measure import paired_turns

SOURCE = '''
import os, signal, sys, time
import torch
from deepseek_r1.engines._eager import EagerEngine

class Good(EagerEngine):
    """Remembers its answers, so that it surely wins."""
    name = "good"
    def open(self, folder, program):
        run, kept = super().open(folder, program), {}
        def call(leaves):
            key = tuple((v.data_ptr(), tuple(v.shape)) for v in leaves)
            if key not in kept:
                kept[key] = (leaves, run(leaves))
            return kept[key][1]
        return call

class Talks(Good):
    name = "talks"
    def build(self, program, folder, precision):
        print("lines on standard output", flush=True)
        os.write(1, b"and below Python")

class Dies(EagerEngine):
    name = "dies"
    def build(self, program, folder, precision):
        os.kill(os.getpid(), signal.SIGFPE)

class Leaves(EagerEngine):
    name = "leaves"
    def open(self, folder, program):
        sys.stderr.write("the licence has expired")
        sys.stderr.flush()
        os._exit(3)

class Hangs(EagerEngine):
    name = "hangs"
    def open(self, folder, program):
        return lambda leaves: time.sleep(1000)

class Hungry(EagerEngine):
    name = "hungry"
    def build(self, program, folder, precision):
        self.kept = [torch.ones(1 << 24) for _ in range(100)]
        time.sleep(1000)

class Tires(Good):
    name = "tires"
    def open(self, folder, program):
        run, left = super().open(folder, program), [20]
        def call(leaves):
            left[0] -= 1
            if left[0] < 0:
                os.abort()
            return run(leaves)
        return call
'''
NAMES = ["good", "talks", "dies", "leaves", "hangs", "hungry", "tires"]
X = torch.randn(16, 32)
QUICK = RaceConfig(timeout_s=5, rounds=12, seconds=0.5, cache=False)


@pytest.fixture(autouse=True)
def _engines(tmp_path, monkeypatch):
    """A distribution with engines, as a third party installs one: child processes find it too."""
    info = tmp_path / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = faulty_engines:{name.title()}" for name in NAMES)
    (info / "entry_points.txt").write_text(f"[deepseek_r1.engines]\n{lines}\n")
    (tmp_path / "faulty_engines.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ENGINES, "_loaded", {})
    monkeypatch.delitem(sys.modules, "faulty_engines", raising=False)
    # Children that were started before do not know the distribution.
    _process._end_idle()
    yield
    _process._end_idle()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4)).eval()


def reasons(executable):
    return dict(executable.report.skipped)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("dies", "compiling failed: its process died of SIGFPE"),
        ("leaves", "compiling failed: its process ended with exit code 3: the licence has expired"),
        ("hangs", "failed: did not answer within 5 s and was ended"),
        ("tires", "failed: its process died of SIGABRT"),
    ],
)
def test_what_ends_a_child_costs_that_candidate_only(net, engine, reason):
    fast = optimize(net, example_inputs=X, engines=[engine, "good"], race=QUICK)
    assert reasons(fast)[f"{engine} fp32"] == reason
    assert fast.engine == "good"
    torch.testing.assert_close(fast(X), net(X))
    assert not any("in this process" in note for note in fast.report.notes)
    assert fast.report["compile time, good fp32"].after >= 0


def test_memory_is_bounded(net):
    limited = RaceConfig(timeout_s=60, rounds=5, seconds=0.5, memory_gb=2.0, cache=False)
    start = time.monotonic()
    fast = optimize(net, example_inputs=X, engines=["hungry"], race=limited)
    assert fast.engine == "eager"
    assert "of memory, allowed 2.0, and was ended" in reasons(fast)["hungry fp32"]
    assert time.monotonic() - start < 50, "ended for its memory, not for its time"


def test_what_an_engine_prints_does_not_disturb(net):
    fast = optimize(net, example_inputs=X, engines=["talks"], race=QUICK)
    assert fast.engine == "talks"


def test_children_are_kept_warm_and_end_with_the_parent(net):
    optimize(net, example_inputs=X, engines=["good"], race=QUICK)
    (first,) = _process._idle
    optimize(net, example_inputs=X, engines=["good"], race=QUICK)
    assert _process._idle == [first]
    code = (
        "import os, signal\n"
        "from deepseek_r1.engines._process import Worker\n"
        "worker = Worker()\n"
        "worker.ask('drop', timeout_s=60)\n"
        "print(worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 20
    while _alive(int(done.stdout)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _alive(int(done.stdout))


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_idle_child_is_replaced(net):
    optimize(net, example_inputs=X, engines=["good"], race=QUICK)
    os.kill(_process._idle[0]._process.pid, signal.SIGKILL)
    assert optimize(net, example_inputs=X, engines=["good"], race=QUICK).engine == "good"


def test_requests_that_fail_leave_the_child_alive():
    worker = Worker()
    try:
        with pytest.raises(ChildError, match="AttributeError"):
            worker.ask("nothing", timeout_s=60)
        with pytest.raises(ChildError, match="load comes first"):
            worker.ask("answer", timeout_s=60, inputs="a", outputs="b")
        assert worker.ask("drop", timeout_s=60) == {"ok": True}
    finally:
        worker.kill()
    with pytest.raises((ChildError, ValueError)):
        worker.ask("drop", timeout_s=1)


def test_what_cannot_travel_is_raced_here_and_said(net):
    ENGINES.register("mine", type("Mine", (EagerEngine,), {"name": "mine"}))
    try:
        fast = optimize(net, example_inputs=X, engines=["mine"], race=QUICK)
        assert "mine fp32 was raced in this process: the engine is registered in this process only" in fast.report.notes
    finally:
        ENGINES.unregister("mine")
    here = RaceConfig(isolated=False, rounds=5, seconds=0.5, cache=False)
    fast = optimize(net, example_inputs=X, engines=["good"], race=here)
    assert any("asked for by RaceConfig(isolated=False)" in note for note in fast.report.notes)


def test_operators_written_in_python_are_raced_here():
    with torch.library._scoped_library("isolation_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: torch.empty_like(x), "Meta")

        class Net(nn.Module):
            def forward(self, x):
                return torch.ops.isolation_test.twice(x) + 1

        fast = optimize(Net(), example_inputs=X, engines=["good"], race=QUICK)
        assert any("operators of isolation_test are known to this process only" in n for n in fast.report.notes)
        torch.testing.assert_close(fast(X), X * 2 + 1)


def test_the_slower_half_leaves_early(net, monkeypatch):
    monkeypatch.setattr(_rungs, "_FINALISTS", 1)
    rungs = []

    def turns(rivals, **how):
        rungs.append(set(rivals))
        slow = lambda turn: lambda settle, calls: turn(settle, calls) + 1.0  # noqa: E731
        return paired_turns({n: t if n.startswith("good") else slow(t) for n, t in rivals.items()}, **how)

    monkeypatch.setattr(_rungs, "paired_turns", turns)
    fast = optimize(net, example_inputs=X, engines=["good", "onnxruntime"], race=QUICK)
    assert fast.engine == "good"
    assert "times as slow as good fp32 in the first rounds" in reasons(fast)["onnxruntime fp32"]
    assert "onnxruntime fp32" in rungs[0] - rungs[1]
    assert "latency, onnxruntime fp32" in fast.report


@pytest.mark.parametrize(
    ("field", "value"), [("timeout_s", 0), ("memory_gb", -1), ("seconds", "long"), ("rounds", 4), ("rounds", 9.5)]
)
def test_wrong_settings(field, value):
    with pytest.raises(ConfigError, match=rf"RaceConfig\({field}="):
        RaceConfig(**{field: value})


def test_a_child_ends_when_idle_only_while_it_holds_no_candidate(tmp_path):
    capture(nn.Linear(2, 2), torch.ones(2, 2)).save(tmp_path / "program.dr1")
    code = "from deepseek_r1.engines import _worker; _worker.IDLE_SECONDS = 0.5; _worker.main()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], text=True, bufsize=1, **pipes) as child:

        def ask(**request):
            child.stdin.write(json.dumps(request) + "\n")
            return json.loads(child.stdout.readline())

        loaded = {"program": str(tmp_path / "program.dr1"), "imports": [], "libraries": {}, "threads": 1}
        assert ask(op="load", device="cpu", **loaded) == {"ok": True}
        time.sleep(1.5)
        assert child.poll() is None
        assert ask(op="drop") == {"ok": True}
        assert child.wait(10) == 0
