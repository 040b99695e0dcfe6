"""Trainings that are killed at any moment, even within a save, end with the bits of one that never was."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deepseek_r1.train._checkpoint as disk
from deepseek_r1.train._folder import checkpoints
from deepseek_r1.train._logs import NAME, read_lines

EPOCHS, STEPS = 4, 12


class Nursery:
    """The program of recovery.py: each job is a training in a process of its own, without importing torch again."""

    def __init__(self, place):
        self.place = place
        script = Path(__file__).with_name("recovery.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, folder, in_background, **job):
        """The exit code of a training in `folder`, or minus the signal that ended it."""
        job = {
            "kind": "global",
            "epochs": EPOCHS,
            **job,
            "folder": str(folder),
            "fields": {"async_save": in_background},
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        answer = self.process.stdout.readline()
        assert answer, "recovery.py has died"
        return json.loads(answer)["status"]

    def said(self, folder):
        return Path(f"{folder}.err").read_text()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.process.stdin.close()
    made.process.wait(30)
    made.process.stdout.close()


@pytest.fixture(scope="module")
def whole(nursery):
    """Results of uninterrupted runs, in the foreground and in the background, and how long they took."""
    found = {}
    for in_background in (False, True):
        folder = nursery.place / f"whole-{in_background}"
        began = time.monotonic()
        assert nursery.run(folder, in_background) == 0, nursery.said(folder)
        found[in_background] = {**result(folder), "ms": 1000 * (time.monotonic() - began)}
    # The first includes the start of the nursery.
    found[False]["ms"] = found[True]["ms"]
    assert len(found[False]["losses"]) == STEPS
    assert same_run(found[False], found[True])
    return found


def result(folder):
    return json.loads((folder / "result.json").read_text())


def same_run(a, b):
    return all(a[part] == b[part] for part in ("losses", "history", "weights"))


def check_disk(folder):
    """Every checkpoint that has a checkpoint's name is whole. The number of them."""
    found = checkpoints(folder)
    for path in found.values():
        disk.verify(path)
    return len(found)


def check_log(folder, losses):
    entries = read_lines(folder / "log" / NAME)
    steps = [(e["step"], e["loss"]) for e in entries if e["kind"] == "step"]
    assert steps == [tuple(point) for point in losses], "each step once, in order, and to the bit"
    assert [e["epoch"] for e in entries if e["kind"] == "epoch"] == list(range(1, EPOCHS + 1))


def strike(rng, whole):
    """A way to kill a run: at a call that touches the disk, or at a random time."""
    if rng.random() < 0.7:
        return {"call": rng.randint(1, max(2, whole["calls"] // 4)), "when": rng.choice(["before", "after", "half"])}
    return {"ms": rng.uniform(0.02, 0.6) * whole["ms"], "signal": signal.SIGKILL}


def kill_until(nursery, whole, kills, in_background, seed):
    """Kill runs so many times in all; each run goes on until it ends."""
    rng = random.Random(seed)
    done, runs, found = 0, 0, 0
    while done < kills:
        folder = nursery.place / f"run-{seed}-{runs}"
        runs += 1
        for _ in range(200):
            job = strike(rng, whole[in_background]) if done < kills else {}
            status = nursery.run(folder, in_background, **job)
            if status == 0:
                break
            assert status == -signal.SIGKILL, nursery.said(folder)
            done += 1
            found += check_disk(folder) if folder.exists() else 0
        assert same_run(result(folder), whole[in_background]), (runs, seed)
        check_log(folder, whole[in_background]["losses"])
        assert check_disk(folder) in (2, 3)
    assert found, "some kills came after a checkpoint was there"


@pytest.mark.parametrize("in_background", [False, True])
def test_ten_kills_change_nothing(nursery, whole, in_background):
    kill_until(nursery, whole, 5, in_background, seed=int(in_background))


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_a_hundred_kills_change_nothing(nursery, whole, in_background):
    kill_until(nursery, whole, 100, in_background, seed=10 + in_background)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "half"])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_kill_at_every_third_call(nursery, whole, when, in_background):
    first = 1 + ["before", "after", "half"].index(when)
    for call in range(first, whole[in_background]["calls"] + 1, 3):
        folder = nursery.place / f"every-{when}-{in_background}-{call}"
        status = nursery.run(folder, in_background, call=call, when=when)
        if folder.exists():
            check_disk(folder)
        if status:
            assert nursery.run(folder, in_background) == 0, nursery.said(folder)
        assert same_run(result(folder), whole[in_background]), call


@pytest.mark.parametrize("in_background", [False, True])
def test_sigterm_saves_and_exits_0_and_the_run_goes_on(nursery, whole, in_background):
    rng = random.Random(3)
    ended, ms = 0, 0.5 * whole[in_background]["ms"]
    for attempt in range(10):
        folder = nursery.place / f"terminated-{in_background}-{attempt}"
        for _ in range(3):
            status = nursery.run(folder, in_background, ms=rng.uniform(0.5, 1) * ms, signal=signal.SIGTERM)
            assert status in (0, -signal.SIGTERM), nursery.said(folder)
            check_disk(folder)
        ended += nursery.said(folder).count("\nresume with: trainer.resume(), then trainer.train(epochs=4)\n")
        assert nursery.run(folder, in_background) == 0, nursery.said(folder)
        assert same_run(result(folder), whole[in_background])
        check_log(folder, whole[in_background]["losses"])
        if ended > 1:
            return
        ms *= 0.8
    raise AssertionError("no signal met a run under way")


def test_two_signals_within_a_save_do_not_tear_it(nursery, whole):
    """At each of the calls that write the fourth and fifth checkpoint."""
    calls = whole[False]["calls"]
    for call in range(calls // 3, calls // 3 + 8):
        folder = nursery.place / f"twice-{call}"
        assert nursery.run(folder, False, call=call, twice=True) == 0, nursery.said(folder)
        assert not (folder / "result.json").exists()
        assert check_disk(folder)
        assert not list(folder.glob(".step-*")), "what was begun was finished"
    assert nursery.run(folder, False) == 0
    assert same_run(result(folder), whole[False])


def test_sigterm_to_workers_too_leaves_a_run_that_goes_on(nursery):
    """As a scheduler does it that signals every process of a job."""
    reference, folder = nursery.place / "workers-whole", nursery.place / "workers"
    assert nursery.run(reference, False, kind="workers") == 0
    ended = 0
    for ms in (150, 300, 450):
        status = nursery.run(folder, False, kind="workers", ms=ms, signal=signal.SIGTERM)
        assert status in (0, -signal.SIGTERM, 143), nursery.said(folder)
        ended += "resume with:" in nursery.said(folder)
    assert nursery.run(folder, False, kind="workers") == 0, nursery.said(folder)
    assert ended, nursery.said(folder)
    assert same_run(result(folder), result(reference))
