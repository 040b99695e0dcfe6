"""Help answers at once, imports nothing heavy, looks the same everywhere, and is what the documentation shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_r1.cli._helppages import pages, refresh

ROOT = Path(__file__).parents[2]
COMMANDS = ["", *sorted(name for name in pages() if name)]
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "onnxscript", "matplotlib", "scipy", "sklearn", "safetensors", "PIL"}
WATCH = """
import sys
from deepseek_r1.cli import main
try:
    main()
finally:
    sys.stderr.write(",".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def _help(name, **environment):
    command = [sys.executable, "-m", "deepseek_r1", *([name] if name else []), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return done.stdout


def test_every_verb_is_there():
    assert COMMANDS == [
        "",
        "build-op",
        "cache",
        "compress",
        "doctor",
        "export",
        "optimize",
        "prune",
        "quantize",
        "run",
        "trace",
        "train",
        "version",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_takes_less_than_three_tenths_of_a_second_of_cpu(name, child_cpu_s, slower):
    command = [sys.executable, "-m", "deepseek_r1", *([name] if name else []), "--help"]
    # The best of three: neighbours on the machine slow the clock of a process, nothing makes it faster.
    assert min(child_cpu_s(command) for _ in range(3)) < 0.3 * slower


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    command = [sys.executable, "-c", WATCH, *([name] if name else []), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split(","))
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_the_watch_above_would_see_a_heavy_import():
    done = subprocess.run(
        [sys.executable, "-c", "import numpy\n" + WATCH, "--help"], capture_output=True, text=True, check=True
    )
    assert set(done.stderr.split(",")) & HEAVY == {"numpy"}


def test_help_does_not_depend_on_the_terminal():
    assert _help("train", COLUMNS="40", TERM="dumb") == _help("train", COLUMNS="200", FORCE_COLOR="1")


def test_the_pages_are_what_help_prints():
    assert _help("export").strip() == pages()["export"].strip()


def test_the_documentation_shows_every_page_as_it_is():
    text = (ROOT / "docs" / "cli.md").read_text()
    assert refresh(text) == text, "run: python -m deepseek_r1.cli._helppages docs/cli.md"
    for name, page in pages().items():
        assert page in text, name


def test_a_stale_page_is_noticed():
    assert refresh("<!-- help:version -->\n```text\nold\n```\n") != "<!-- help:version -->\n```text\nold\n```\n"
    with pytest.raises(KeyError):
        refresh("<!-- help:nonsense -->\n```text\n```\n")
