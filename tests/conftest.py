"""Fixtures that several rooms share."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

#: A fixed piece of work, most of it imports, and the processor seconds that it takes on the machine for which the tests
#: name their limits.
_WORK = (
    "import asyncio, concurrent.futures, csv, ctypes, decimal, difflib, doctest, http.server, inspect, json, "
    "logging.config, multiprocessing.pool, pydoc, sqlite3, statistics, tarfile, unittest.mock, urllib.request, "
    "xml.dom.minidom"
)
_WORK_CPU_S = 0.105


def _child_cpu_s(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.fixture(scope="session")
def child_cpu_s() -> Callable[[list[str]], float]:
    """Processor seconds of a command; it must succeed."""
    return _child_cpu_s


@pytest.fixture
def slower() -> float:
    """How many times slower than usual this machine computes at the moment, at least 1; for limits in seconds.

    Neighbours that share caches and cores lengthen processor seconds too, by half and more.
    """
    return max(1.0, min(_child_cpu_s([sys.executable, "-c", _WORK]) for _ in range(3)) / _WORK_CPU_S)


@pytest.fixture(scope="session")
def digits_artifact(tmp_path_factory):
    """An Artifact for the digits data, raw scans [n, 64], and the labels that the module gives them (untrained)."""
    import torch

    from deepseek_r1.data import digits
    from deepseek_r1.deploy import export
    from deepseek_r1.models import DigitsNet
    from deepseek_r1.runtime import preprocess

    torch.manual_seed(0)
    net = DigitsNet(width=4).eval()
    data = digits()
    path: Path = tmp_path_factory.mktemp("digits") / "artifact"
    export(net, path, example_inputs=data.tensors("test")[0][:8], labels=data.labels, preprocessing=data.preprocessing)
    from sklearn.datasets import load_digits

    raw = load_digits().data[:20]
    with torch.no_grad():
        classes = net(torch.from_numpy(preprocess(data.preprocessing, raw))).argmax(-1)
    return path, np.asarray(raw), [data.labels[i] for i in classes.tolist()]
