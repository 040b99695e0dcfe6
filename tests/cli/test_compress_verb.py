"""`deepseek-r1 compress` on a user's own model and data, as a user types it."""

import json

import pytest

from deepseek_r1.graph import Program

from .test_prune_verb import _done, place, run  # noqa: F401 - the same model and data


def test_a_budget_below_a_byte_a_number_cuts_and_quantises(run, place):  # noqa: F811
    line = "--data data.npz --size-mb 0.0012 --engine eager --epochs 4 --lr 0.01 --candidates 1"
    _done(run(f"compress model.py:build {line} --out tiny.dr1 --json c.json"))
    program = Program.load(place / "tiny.dr1")
    assert program.parameters_bytes <= 1200
    report = json.loads((place / "c.json").read_text())
    assert any(note.startswith("chosen: cut") for note in report["notes"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compress model.py:build --out x.onnx", "--data"),
        ("compress model.py:build --data data.npz --out x.pth", ".onnx"),
        ("compress model.py:build --data data.npz --candidates 0 --out x.onnx", "candidates"),
        ("compress model.py:build --data data.npz --size-mb 0.00001 --engine eager --epochs 0 --out x.onnx", "budget"),
    ],
)
def test_wrong_use_is_said(run, place, line, said):  # noqa: F811
    result = run(line)
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert not (place / "x.onnx").exists()
