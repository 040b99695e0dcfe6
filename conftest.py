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

#: Minutes each. They come first, so that at the end no process waits for another that has just begun with one of them.
_LONGEST = (
    "tests/docs/test_blocks.py",
    "tests/engines/",
    "tests/recipes/",
    "tests/cli/test_verbs.py",
    "tests/deploy/",
    "src/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, otherwise in the order of the folders."""
    items.sort(key=lambda item: next((i for i, p in enumerate(_LONGEST) if item.nodeid.startswith(p)), len(_LONGEST)))


@pytest.fixture(autouse=True)
def _own_cache(request, tmp_path_factory, monkeypatch):
    """Each test remembers its own choices only, and leaves the user's alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    if isinstance(request.node, pytest.DoctestItem):
        # Inductor takes half a minute for each model; an example shows what comes out, whoever has won.
        monkeypatch.setenv("CXX", "no-compiler")
