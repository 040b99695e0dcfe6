"""What is shown of a run: on a terminal, as lines elsewhere; losses that come late; and arithmetic against the peak."""

from __future__ import annotations

import io

import pytest
import rich.console
import torch
from torch import nn

import deepseek_r1.train._watch as watch_module
from deepseek_r1.core import progress as bars
from deepseek_r1.train import Trainer, TrainingConfig
from deepseek_r1.train._flops import peak_flops, step_flops
from deepseek_r1.train._logs import NAME, read_lines
from deepseek_r1.train._progress import Progress


def data(n=6):
    return [(torch.rand(4, 3), torch.randint(0, 2, (4,))) for _ in range(n)]


def make(**fields):
    config = TrainingConfig(device="cpu", log_every=2, **fields)
    return Trainer(nn.Linear(3, 2), data(), lr=1e-2, config=config)


@pytest.fixture
def terminal(monkeypatch):
    out, real = io.StringIO(), rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: real(file=out, force_terminal=True, width=140))
    monkeypatch.setattr(watch_module, "_DRAW_S", 0.0)
    return out


def test_a_terminal_shows_loss_rate_memory_and_what_is_left(terminal):
    make().train(epochs=2)
    drawn = terminal.getvalue()
    for part in ("training", "12/12", "loss ", "samples/s", " GB", "0:00:0"):
        assert part in drawn
    assert "MFU" not in drawn, "of a CPU no peak is known"


def test_mfu_is_shown_where_the_peak_is_known(terminal, monkeypatch, tmp_path):
    monkeypatch.setattr(watch_module, "device_peak", lambda device, precision: 1e6)
    make(log_dir=str(tmp_path)).train(epochs=1)
    assert "MFU" in terminal.getvalue()
    entry = read_lines(tmp_path / NAME)[0]
    flops = 3 * 2 * 3 * 2
    assert entry["mfu"] == pytest.approx(flops * entry["samples_per_s"] / 1e6, abs=1e-3)


def test_no_terminal_no_lines_in_a_short_run(capfd):
    make().train(epochs=1)
    assert capfd.readouterr() == ("", "")


def test_a_long_run_says_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(watch_module, "_DRAW_S", 0.0)
    monkeypatch.setattr(watch_module, "_LINE_S", 1e-9)
    make().train(epochs=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("training 3/6 (50 %), 0:00:00 left: loss ")
    bars.enabled(False)
    try:
        make().train(epochs=1)
        assert capsys.readouterr().err == ""
    finally:
        bars.enabled(True)


def test_a_resumed_run_counts_from_where_it_was(terminal, tmp_path):
    make(save_dir=str(tmp_path)).train(epochs=1)
    terminal.seek(0)
    terminal.truncate()
    again = make(save_dir=str(tmp_path))
    again.resume()
    again.train(epochs=2)
    assert " 6/12" in terminal.getvalue()
    assert " 0/12" not in terminal.getvalue()
    assert "12/12" in terminal.getvalue()


def test_lines_without_a_total():
    ticks, said = iter([0.0, 1.0, 2.0]), []
    advance = bars.Lines("work", None, 1.5, done=3, clock=lambda: next(ticks), write=said.append)
    advance(1, "a")
    advance(1, "b")
    assert said == ["work 5: b\n"]


class Late:
    """Stands for a loss on a GPU."""

    device = torch.device("cuda")


class Event:
    def __init__(self):
        self.arrived = False

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = True


def test_losses_on_a_gpu_are_read_when_they_have_arrived_and_never_waited_for(monkeypatch):
    state, sent = Progress(), []

    def send(self):
        event = Event()
        values = torch.tensor([float(u.step) for u in self.unread] + [9.0 for u in self.unread if u.norm is not None])
        self.moving.append((self.unread, values, event))
        sent.append(event)
        self.unread = []

    monkeypatch.setattr(Progress, "_send", send)
    for _ in range(5):
        state.count(Late(), 1, 4, 0.1, log_every=2, norm=torch.tensor(0.0))
    assert (state.points, state.recent, len(sent)) == ([], None, 2)
    sent[0].arrived = True
    state.count(Late(), 1, 4, 0.1, log_every=2, norm=torch.tensor(0.0))
    assert state.points == [(2, 1.5)], "the second transfer is still on its way"
    assert state.norms == {2: 9.0}
    assert state.recent == 2.0
    state.read()
    assert state.points == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert state.loss_sum == 4 * 21
    assert state.norms == {2: 9.0, 4: 9.0, 6: 9.0}
    assert Progress.from_dict(state.to_dict()).points == state.points


def test_flops_are_counted_on_shapes_alone():
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2)
    model = nn.Sequential(*layers)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = (torch.rand(5, 3, 6, 6), torch.zeros(5, dtype=torch.long))
    state = torch.get_rng_state()
    assert step_flops(model, batch) == 3 * 2 * (3 * 9 * 4 * 16 + 64 * 2)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())

    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    assert step_flops(Reads(3, 2), torch.rand(2, 3)) is None


def test_peaks_by_name():
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32", tf32=True) == 494e12
    assert peak_flops("NVIDIA L4", "bf16") == 121e12
    assert peak_flops("Somebody's GPU", "bf16") is None
