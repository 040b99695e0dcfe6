"""Every page that shows code runs as it stands: its Python and shell blocks, in their order, in an empty folder.

- a `python` block runs in one namespace with the others of its page; with `title="name"` it is a file instead
- of a `console` or `bash` block, the lines that begin with `$ ` run; one without such lines runs whole
- a `text` block right behind another block is what that block prints
- `<!-- not run: reason -->` before a block leaves it out; `<!-- needs: a, b -->` where those packages are not installed
- `<!-- page needs: a, b -->` skips the whole page where they are not. A name that ends in .tar.gz is a package's source
  archive, which `make` puts below the environment's share/archives; the page finds it in its folder
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: README.zh-CN.md has the blocks of README.md, which a test compares; docs/cli.md is compared with the help pages.
LEFT_OUT = {"docs/cli.md"}
_FENCE = re.compile(
    r"(?P<skip><!-- (?:needs: (?P<needs>[^>]+?)|not run: [^>]+?) -->\s*)?"
    r"^```(?P<kind>\w+)(?P<info>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


_PAGE_NEEDS = re.compile(r"<!-- page needs: ([^>]+?) -->")
ARCHIVES = Path(sys.prefix) / "share" / "archives"


def present(name: str) -> bool:
    """Whether a package is installed, or its source archive is here."""
    return (ARCHIVES / name).is_file() if name.endswith(".tar.gz") else importlib.util.find_spec(name) is not None


def page_needs(text: str) -> list[str]:
    """What a page cannot do without."""
    found = _PAGE_NEEDS.search(text)
    return found[1].split(", ") if found else []


def blocks(text: str) -> list[dict[str, str]]:
    """The blocks of a page that are run, each with its kind, its code and what it should print."""
    found: list[dict[str, str]] = []
    end = None
    for match in _FENCE.finditer(text):
        kind, code, gap = match["kind"], match["code"], text[end : match.start()] if end is not None else "-"
        if kind == "text" and not gap.strip():
            found[-1]["prints"] = code
        end = None
        needs = match["needs"].split(", ") if match["needs"] else []
        missing = [package for package in needs if not present(package)]
        if kind not in ("python", "console", "bash") or missing or (match["skip"] and not needs):
            continue
        title = re.search(r'title="([^"]+)"', match["info"])
        lines = [line[2:] for line in code.splitlines() if line.startswith("$ ")]
        if kind != "python" and lines:
            code = "\n".join(lines)
        found.append({"kind": "file" if title else "python" if kind == "python" else "shell", "code": code})
        if title:
            found[-1]["name"] = title[1]
        end = match.end()
    return found


PAGES = [
    name
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
    if (name := path.relative_to(ROOT).as_posix()) not in LEFT_OUT and blocks(path.read_text())
]

#: Runs in its own process: `sys.argv[1]` is a file with the blocks.
DRIVER = textwrap.dedent(
    """
    import contextlib, io, json, linecache, pathlib, subprocess, sys, types

    page = types.ModuleType("__page__")
    sys.modules["__page__"] = page  # classes of the page can be pickled
    page.__dict__["__name__"] = "__page__"
    for number, block in enumerate(json.load(open(sys.argv[1])), 1):
        out = io.StringIO()
        if block["kind"] == "file":
            pathlib.Path(block["name"]).write_text(block["code"])
        elif block["kind"] == "python":
            where = f"block {number}"
            linecache.cache[where] = (len(block["code"]), None, block["code"].splitlines(True), where)
            code = compile(block["code"], where, "exec")
            with contextlib.redirect_stdout(out):
                exec(code, page.__dict__)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], capture_output=True, text=True)
            out.write(done.stdout)
            assert done.returncode == 0, f"block {number} exits {done.returncode}:\\n{done.stdout}{done.stderr}"
        if "prints" in block:
            got, wanted = out.getvalue().rstrip(), block["prints"].rstrip()
            assert got == wanted, f"block {number} prints\\n{got}\\ninstead of\\n{wanted}"
    """
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PAGES)
def test_the_page_runs(name, tmp_path):
    text = (ROOT / name).read_text()
    needs = page_needs(text)
    if missing := [what for what in needs if not present(what)]:
        pytest.skip(f"not here: {', '.join(missing)} (make test puts them there)")
    (tmp_path / "driver.py").write_text(DRIVER)
    shown = blocks(text)
    (tmp_path / "blocks.json").write_text(json.dumps(shown))
    place = tmp_path / "place"
    place.mkdir()
    for archive in (what for what in needs if what.endswith(".tar.gz")):
        shutil.copy(ARCHIVES / archive, place)
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    # One thread: threads of torch that wait for each other on a busy machine make a page ten times slower.
    environment = {**os.environ, "PATH": os.pathsep.join(paths), "COLUMNS": "110", "OMP_NUM_THREADS": "1"}
    if not any(word in block["code"] for block in shown for word in ("inductor", "build-op", "torch.compile")):
        # Inductor takes half a minute for each model, and no such page asks for it: there is no compiler for it here.
        environment["CXX"] = str(tmp_path / "no-compiler")
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "blocks.json")]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"


def test_the_pages_of_code_are_all_here():
    assert {"README.md", "docs/training.md", "docs/data.md", "docs/onnx-import.md"} <= set(PAGES)
    assert {p for p in PAGES if p.startswith("docs/tutorials/")} == {
        f"docs/tutorials/{p.name}" for p in (ROOT / "docs" / "tutorials").glob("*.md")
    }


@pytest.mark.tiny
def test_blocks_are_told_apart():
    page = textwrap.dedent(
        """
        ```python
        print(1)
        ```

        ```text
        1
        ```

        words

        ```text
        other
        ```

        <!-- not run: needs a wheel -->
        ```bash
        rm everything
        ```

        <!-- needs: json, no_such_package -->
        ```python
        import no_such_package
        ```

        ```text
        not printed
        ```

        <!-- needs: json, torch -->
        ```python
        import json, torch
        ```

        ```python title="a.py"
        x = 1
        ```

        ```console
        $ echo a
        a
        $ echo b
        ```
        """
    )
    assert blocks(page) == [
        {"kind": "python", "code": "print(1)\n", "prints": "1\n"},
        {"kind": "python", "code": "import json, torch\n"},
        {"kind": "file", "code": "x = 1\n", "name": "a.py"},
        {"kind": "shell", "code": "echo a\necho b"},
    ]


@pytest.mark.tiny
def test_a_page_names_what_it_needs():
    text = "words\n\n<!-- page needs: json, no_such_package, none-1.0.tar.gz -->\n\n```python\nprint(1)\n```\n"
    assert [present(what) for what in page_needs(text)] == [True, False, False]
    assert page_needs("<!-- needs: json -->") == []


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kind": "python", "code": "assert 1 == 2"}, "AssertionError"),
        ({"kind": "python", "code": "print(1)", "prints": "2\n"}, "instead of"),
        ({"kind": "shell", "code": "false\ntrue"}, "exits 1"),
    ],
)
def test_a_block_that_fails_is_noticed(block, message, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "blocks.json").write_text(json.dumps([block]))
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "blocks.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert message in done.stderr
