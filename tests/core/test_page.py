"""The report's page: what its figures and sections look like in words."""

from __future__ import annotations

import re
import subprocess
import sys

from deepseek_r1.core import Report
from deepseek_r1.core._page import page


def test_facts_of_a_section_are_not_said_twice():
    section = Report("export", facts={"CPU": "X9", "versions": "torch 2"})
    text = page(Report("journey", facts={"CPU": "X9"}, sections=[section]))
    assert text.count("X9") == 1
    assert "torch 2" in text
    other = Report("export", facts={"CPU": "Y7"})
    assert "Y7" in page(Report("journey", facts={"CPU": "X9"}, sections=[other])), "another value is said"


def test_the_time_is_readable():
    assert "2030-01-02 03:04:05 UTC" in page(Report("r", created="2030-01-02T03:04:05+00:00"))


def _ticks(report: Report) -> list[float]:
    """Labels of the x axis of the only figure (the first group of ticks in the SVG)."""
    axis = page(report).partition('id="matplotlib.axis_1"')[2].partition('id="matplotlib.axis_2"')[0]
    labels = re.findall(r">([\d.]+)</text>", axis)
    assert labels
    return [float(v) for v in labels]


def test_values_far_apart_get_a_logarithmic_axis():
    near, far = Report("near"), Report("far")
    near.plot("histogram", "t", {"a": [1.0, 1.1, 1.2], "b": [2.0, 2.1, 2.2]})
    far.plot("histogram", "t", {"a": [1.0, 1.1, 1.2], "b": [80.0, 81.0, 82.0]})
    steps = [b - a for a, b in zip(_ticks(near), _ticks(near)[1:])]
    assert max(steps) < 1.01 * min(steps)
    inside = _ticks(far)
    assert {1.0, 10.0} <= set(inside)
    assert max(inside[1:]) / min(inside) > 5


def test_shares_do_not_go_beyond_a_hundred_and_names_stand_at_their_points():
    report = Report("r")
    report.plot(
        "scatter",
        "t",
        {"before": [[2.0, 99.0, 300]], "after": [[1.0, 99.0, 90]]},
        y_label="accuracy, %",
        labels=["340 kB", "99 kB"],
    )
    text = page(report)
    numbers = [float(v) for v in re.findall(r">([\d.]+)</text>", text)]
    assert max(numbers) <= 100
    for word in ("before", "after", "340 kB", "99 kB"):
        assert text.count(f">{word}<") == 1, word


def test_a_report_without_figures_needs_no_matplotlib(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from deepseek_r1.core import Report\n"
        "r = Report('doctor'); r.add('cores', 2); r.save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.html")], check=True)
    assert "cores" in (tmp_path / "r.html").read_text()


def test_a_wide_table_scrolls_by_itself():
    report = Report("r", facts={"CPU": "X9"})
    report.add("size", 1)
    text = page(report)
    assert ".wide{overflow-x:auto}" in text
    assert text.count("<table>") == text.count('<div class="wide"><table>') == text.count("</table></div>") == 2
