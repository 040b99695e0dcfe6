"""Progress bars: items pass through untouched, and nothing is drawn where there is no terminal."""

from __future__ import annotations

import io

import pytest
import rich.console

from deepseek_r1.core import progress


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal of which we keep what was drawn."""
    out = io.StringIO()
    real = rich.console.Console

    def console(**_):
        return real(file=out, force_terminal=True, width=100)

    monkeypatch.setattr(rich.console, "Console", console)
    yield out
    progress.enabled(True)


def test_items_pass_through(capsys):
    assert list(progress.track(range(5), "work")) == [0, 1, 2, 3, 4]
    assert list(progress.track(iter("abc"), "work", total=3)) == ["a", "b", "c"]
    assert list(progress.track((i for i in range(2)), "of unknown length")) == [0, 1]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_the_bar(terminal):
    with progress.bar("baking", 2) as advance:
        advance(1, "first")
        advance(1, "loss 0.5")
    drawn = terminal.getvalue()
    assert "baking" in drawn
    assert "loss 0.5" in drawn
    assert "2/2" in drawn


def test_bars_can_be_switched_off(terminal):
    progress.enabled(False)
    assert list(progress.track([1, 2], "silent")) == [1, 2]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_pass_through(terminal, error):
    with pytest.raises(error), progress.bar("work", 3) as advance:
        advance(1, "")
        raise error
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor is shown again"


def test_stopping_early_ends_the_bar(terminal):
    for item in progress.track(range(100), "search"):
        if item == 3:
            break
    with progress.bar("next", 1) as advance:
        advance(1, "")
    assert "next" in terminal.getvalue()
