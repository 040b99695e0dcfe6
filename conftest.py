"""Settings of the whole test run."""

from __future__ import annotations

import os

import pytest

# One thread for each library, in this process and in those that tests start: small operators on several threads are
# slower, and much slower as soon as another program takes a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Doctests are collected from the sources. These modules become torch's own when they are imported, and `deepseek` is
# stubs only.
collect_ignore_glob = ["src/deepseek/*", "src/deepseek_r1/nn/functional.py", "src/deepseek_r1/nn/init.py"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Each test remembers its own choices only, and leaves the user's alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
