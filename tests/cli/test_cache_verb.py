"""`deepseek-r1 cache`."""

import json

import torch
from typer.testing import CliRunner

from deepseek_r1.cli import app
from deepseek_r1.core import Report
from deepseek_r1.engines import ChoiceCache
from deepseek_r1.graph import capture


def test_show_bound_and_clear(tmp_path):
    def cache(*words):
        return CliRunner().invoke(app, ["cache", *words, "--folder", str(tmp_path / "c")])

    assert "0 choices" in cache().output
    signature = capture(torch.nn.Linear(2, 2), torch.randn(2, 2)).signature
    choices = ChoiceCache(tmp_path / "c")
    for key in ("one", "two"):
        choices.put(
            key, None, Report("race"), model="Net", engine="eager", precision="fp32", source="own", signature=signature
        )
    done = cache("--json", str(tmp_path / "r.json"))
    assert done.exit_code == 0
    assert "2 choices" in done.output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [r["metric"] for r in rows] == ["Net", "Net"]
    assert "eager fp32, raced on" in rows[0]["how"]
    assert cache("--limit-gb", "0.000001").exit_code == 0
    assert len(choices.entries()) <= 1
    done = cache("--clear")
    assert "removed" in done.output
    assert choices.entries() == []
    done = cache("--limit-gb", "-1")
    assert done.exit_code == 2
    assert "0 or more is needed" in done.output
