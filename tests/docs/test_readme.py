"""Both READMEs say the same, show the numbers of the kept report, and claim only what a test covers."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from deepseek_r1.core import Report

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README.md", "README.zh-CN.md")


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("readme_numbers", ROOT / "scripts" / "readme_numbers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


numbers = _script()


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def _fences(text: str) -> list[str]:
    return re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)


def _rows(text: str) -> list[tuple[str, str]]:
    """First and last cell of each row of the feature table."""
    rows = re.findall(r"^\| `([\w ]+)` \|.*\| ((?:`[\w/.]+`(?:, )?)+) \|$", text, re.MULTILINE)
    assert len(rows) >= 10
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_the_kept_report(name):
    data = json.loads((ROOT / numbers.DATA).read_text())
    assert numbers.block(data, numbers.READMES[name]) in _text(name)


def test_the_kept_report_is_small_and_good():
    path = ROOT / numbers.DATA
    report = Report.load(path)
    assert report.ok
    assert report.checks
    assert report["accuracy"].after >= 0.99
    assert path.stat().st_size < 50_000
    assert not any(r.plots for r in (report, *report.sections))


def test_the_picture_is_a_small_png():
    data = (ROOT / numbers.PICTURE).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) < 300_000
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1200
    assert height > 800


def test_both_languages_have_the_same_code():
    english, chinese = (_fences(_text(n)) for n in NAMES)
    assert english == chinese
    assert len(english) == 4


def test_both_languages_have_the_same_features():
    assert _rows(_text(NAMES[0])) == _rows(_text(NAMES[1]))


def test_both_languages_have_the_same_numbers_and_files():
    for pattern in (r"(?<![\w.])\d[\d,.]*\d(?![\w])", r"\]\(([^)]+)\)"):
        english, chinese = (sorted(re.findall(pattern, _text(n))) for n in NAMES)
        own = {"README.md", "README.zh-CN.md"}
        assert [e for e in english if e not in own] == [c for c in chinese if c not in own]


def test_every_feature_names_tests_that_exist():
    for feature, cell in _rows(_text(NAMES[0])):
        for name in re.findall(r"`([^`]+)`", cell):
            path = ROOT / name
            files = [path] if path.suffix == ".py" else list(path.glob("test_*.py"))
            assert files, f"{feature}: {name} has no tests"
            assert all("def test_" in f.read_text() for f in files), f"{feature}: {name}"


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)", _text(name)):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("name", "words"), [(NAMES[0], "no affiliation with any company"), (NAMES[1], "与任何公司没有关系")]
)
def test_it_says_who_is_not_behind_it(name, words):
    assert words in " ".join(_text(name).split())


def test_the_example_is_short():
    code = next(f for f in _fences(_text(NAMES[0])) if f.startswith("```python"))
    assert 10 <= len(code.splitlines()) - 2 <= 20


# The script itself, on a copy.


@pytest.fixture
def place(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_text(f"before\n{numbers.BEGIN}\nold\n{numbers.END}\nafter {name}\n")
    return tmp_path


def _journey(**fields: Any) -> Report:
    exported = Report("export", facts={"versions": "torch 2.99, onnxruntime 1.99"})
    exported.plot("line", "curve", {"a": [[0, 1]]})
    facts = {"CPU": "Made-up", "cores": 3, "system": "Linux 6", "noise at batch 1": "eager against itself 1.07x"}
    report = Report("digits", facts=facts, sections=[exported], **fields)
    report.add("accuracy", 0.995, before=0.997, how="359 samples")
    return report


def test_the_script_rewrites_what_is_between_the_markers(place):
    source = _journey(created="2030-01-02T03:04:05+00:00").save(place / "r.json")
    numbers.main([str(source), "--root", str(place)])
    for name, words in ((NAMES[0], "Measured on 2030-01-02 on Made-up with 3 cores"), (NAMES[1], "测量于 2030-01-02")):
        text = (place / name).read_text()
        assert text.startswith(f"before\n{numbers.BEGIN}\n```text\n$ deepseek-r1 run digits\n")
        assert text.endswith(f"{numbers.END}\nafter {name}\n")
        assert "old" not in text
        for piece in (words, "0.997", "0.995", "1.07x", "torch 2.99"):
            assert piece in text
    kept = Report.load(place / numbers.DATA)
    assert kept["accuracy"].before == 0.997
    assert not kept.sections[0].plots
    before = [(place / n).read_bytes() for n in NAMES]
    numbers.main([str(source), "--root", str(place)])
    assert [(place / n).read_bytes() for n in NAMES] == before


@pytest.mark.parametrize("fault", ["failed", "foreign", "marker"])
def test_the_script_writes_nothing_when_something_is_wrong(place, fault):
    report = _journey()
    if fault == "failed":
        report.check("parity", False)
    elif fault == "foreign":
        report.sections.clear()
    else:
        (place / NAMES[1]).write_text("no markers")
    source = report.save(place / "r.json")
    before = [(place / n).read_bytes() for n in NAMES]
    with pytest.raises(SystemExit, match=r"failed|versions|exactly one"):
        numbers.main([str(source), "--root", str(place)])
    assert [(place / n).read_bytes() for n in NAMES] == before
    assert not (place / numbers.DATA).exists()
