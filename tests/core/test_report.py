"""Report: round trips, the page, and what is refused."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from deepseek_r1.core import ArtifactError, Check, ConfigError, Plot, Report, Row
from deepseek_r1.core.report import PLOT_KINDS, SCHEMA_VERSION, format_value


def _full() -> Report:
    report = Report("a <b>journey</b> & more", facts={"CPU": "X", "flags": ["a", "b"], "map": {"k": 1.5}})
    report.add("latency, batch 1", 1.5, before=3.0, unit="ms", how="median of 50")
    report.add("accuracy", np.float32(0.99), unit="")
    report.add("loss", math.nan)
    report.check("parity", True, "2e-7 of at most 1e-5")
    report.check("budget", False, "too <slow>")
    report.note("read me")
    report.skip("int4", "no kernel")
    report.plot("line", "curve", {"train": [[0, 1.0], [1, 0.5]]}, x_label="step", caption="falls")
    report.plot("histogram", "spread", {"a": [1.0, 2.0, 2.5], "b": [3.0]})
    report.plot("scatter", "trade", {"a": [[1, 2]], "b": [[2, 3, 90]]}, labels=["p", "q"])
    report.plot("bar", "sizes", {"fp32": [4.0], "int8": [1.0]})
    report.plot("matrix", "confusion", {"m": [[5, 1], [0, 6]]}, labels=["0", "1"])
    return report


def test_json_round_trip(tmp_path):
    report = _full()
    path = report.save(tmp_path / "r.json")
    again = Report.load(path)
    assert again.to_dict() == report.to_dict()
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION
    assert again["latency, batch 1"] == Row(
        metric="latency, batch 1", after=1.5, before=3.0, unit="ms", how="median of 50"
    )
    assert again["loss"].after == "nan", "JSON has no NaN"
    assert again.skipped == [("int4", "no kernel")]
    assert {p.kind for p in again.plots} == set(PLOT_KINDS)


def test_ok_and_failed():
    report = _full()
    assert not report.ok
    assert report.failed == [Check(name="budget", passed=False, detail="too <slow>")]
    assert Report("empty").ok


def test_rows_by_name():
    report = _full()
    assert "accuracy" in report
    assert "speed" not in report
    with pytest.raises(KeyError, match=r"no row 'speed'.*latency, batch 1"):
        report["speed"]


def test_the_page_is_self_contained_and_escaped(tmp_path):
    path = _full().save(tmp_path / "r.html")
    page = path.read_text()
    assert page.count("<svg ") == 5
    for loading in (r"<script", r"<link", r"<iframe", r"<img", r"@import", r"<object", r"<embed"):
        assert not re.search(loading, page, re.IGNORECASE), loading
    targets = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", page, re.IGNORECASE)
    assert targets, "figures refer to their own parts"
    assert all((a or b).strip("\"'").startswith(("#", "data:")) for a, b in targets)
    assert "a &lt;b&gt;journey&lt;/b&gt; &amp; more" in page
    assert "<b>journey" not in page
    assert "too &lt;slow&gt;" in page
    assert 'aria-label="falls"' in page


def test_the_page_is_the_same_for_the_same_report(tmp_path):
    report = _full()
    assert report.save(tmp_path / "a.html").read_bytes() == report.save(tmp_path / "b.html").read_bytes()


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.json or \.html"):
        _full().save(tmp_path / "r.txt")
    assert not list(tmp_path.iterdir())


def test_a_future_schema_is_refused(tmp_path):
    data = _full().to_dict() | {"schema_version": SCHEMA_VERSION + 1}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=f"schema version {SCHEMA_VERSION + 1}.*Update deepseek-r1"):
        Report.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"rows": []}'])
def test_something_else_is_refused(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="not a report"):
        Report.load(path)


def test_an_unknown_plot_is_refused():
    with pytest.raises(ConfigError, match="line, histogram"):
        Plot(kind="pie", title="t", series={})


def test_the_text_has_every_part():
    text = str(_full())
    for part in (
        "latency, batch 1",
        "1.5",
        "3",
        "median of 50",
        "pass  parity",
        "FAIL  budget",
        "read me",
        "no kernel",
    ):
        assert part in text
    assert "a <b>journey</b> & more" in text


def test_brackets_are_not_markup():
    report = Report("[red]t[/red]")
    report.add("[bold]m", "[/]")
    assert "[bold]m" in str(report)
    assert "[red]t[/red]" in str(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (0, "0"),
        (0.0, "0"),
        (-1234.6, "-1,235"),
        (math.inf, "inf"),
        ("x", "x"),
        (12345678.0, "1.23e+07"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text
