"""Memory that stays with the process while a CPU trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from deepseek_r1.train import _heap

pytestmark = pytest.mark.skipif(_heap._glibc() is None, reason="the C library is not glibc")

#: In a process of its own: the thresholds hold for all that runs in one.
PROGRAM = textwrap.dedent(
    """
    import contextlib, json, resource, sys
    import torch
    from deepseek_r1.train._heap import kept_heap

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def step():
        return sum(float(torch.ones(12_000_000)[-1]) for _ in range(2))

    def faults():
        step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    found = {"before": faults(), "resident": resident()}
    with kept_heap(torch.device(sys.argv[1])):
        with kept_heap(torch.device(sys.argv[1])):
            found["inside"] = faults()
        found["still"] = faults()
        found["resident_inside"] = resident()
    found["resident_after"] = resident()
    print(json.dumps(found))
    """
)


def run(device, **environment):
    command = [sys.executable, "-c", PROGRAM, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**_environment(), **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    return {**kept, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}


def test_a_step_is_handed_the_memory_of_the_step_before():
    found = run("cpu")
    # 48 MB are 12,000 pages of 4 KB, unless the system makes them large ones by itself.
    assert found["inside"] < 100
    assert found["still"] < 100
    assert found["before"] > 10 * max(1, found["inside"])
    # What is free is held, and given back at the end.
    assert found["resident_inside"] > found["resident"] + 40e6
    assert found["resident_after"] < found["resident"] + 20e6


@pytest.mark.parametrize(
    ("device", "environment"),
    [("meta", {}), ("cpu", {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"})],
)
def test_it_is_left_alone_where_it_is_not_ours(device, environment):
    found = run(device, **environment)
    assert found["inside"] > 0.5 * found["before"]


def test_the_thresholds_are_put_back_after_an_error(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    set_to = []
    monkeypatch.setattr(_heap, "_set", lambda libc, values: set_to.append(values))
    with pytest.raises(KeyError), _heap.kept_heap(torch.device("cpu")):
        raise KeyError
    assert set_to == [_heap._KEEP, _heap._USUAL]
    assert _heap._users == 0
