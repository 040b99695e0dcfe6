"""The log of a run: JSON lines without gaps or duplicates, and event files that a reader by the specification reads."""

from __future__ import annotations

import json
import math
import os
import struct

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError
from deepseek_r1.train import Callback, Trainer, TrainingConfig
from deepseek_r1.train._events import EventFile, crc32c, masked, record, scalars_event
from deepseek_r1.train._logs import NAME, RunLog, read_lines
from deepseek_r1.train._watch import tokens_in


def data(n=6):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(n)]


def make(folder, callbacks=(), loader=None, model=None, **fields):
    torch.manual_seed(0)
    fields = {"log_every": 2, "clip_grad_norm": 1.0, "log_dir": str(folder / "log"), **fields}
    model = model or nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    loader = loader or data()
    return Trainer(model, loader, loader, lr=1e-2, config=TrainingConfig(device="cpu", **fields), callbacks=callbacks)


def entries(folder, kind="step"):
    return [e for e in read_lines(folder / "log" / NAME) if e["kind"] == kind]


# A reader of event files, from the specifications alone.


def crc_by_division(data):
    """CRC-32C as polynomial division, bit by bit: the definition that the table in the package shortens."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def unmask(value):
    rotated = (value - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated << 15) | (rotated >> 17)) & 0xFFFFFFFF


def records(raw):
    at = 0
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        assert unmask(struct.unpack_from("<I", raw, at + 8)[0]) == crc_by_division(raw[at : at + 8])
        body = raw[at + 12 : at + 12 + length]
        assert len(body) == length
        assert unmask(struct.unpack_from("<I", raw, at + 12 + length)[0]) == crc_by_division(body)
        yield body
        at += 16 + length


def varint(raw, at):
    value, shift = 0, 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def message(raw):
    """The fields of a protocol buffer: (number, value), nested ones as bytes."""
    at = 0
    while at < len(raw):
        key, at = varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = varint(raw, at)
        elif wire == 1:
            value, at = struct.unpack_from("<d", raw, at)[0], at + 8
        elif wire == 5:
            value, at = struct.unpack_from("<f", raw, at)[0], at + 4
        else:
            assert wire == 2
            size, at = varint(raw, at)
            value, at = raw[at : at + size], at + size
            assert len(value) == size
        yield number, value


def events(folder):
    """All events of a directory in order: (step, scalars by tag, whether a session starts), the version first."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for i, body in enumerate(records(path.read_bytes())):
            fields = dict(message(body))
            assert fields[1] > 1.6e9, "wall time in seconds"
            if i == 0:
                assert fields[3] == b"brain.Event:2"
                continue
            values = {}
            for number, value in message(fields.get(5, b"")):
                assert number == 1
                inner = dict(message(value))
                values[inner[1].decode()] = inner[2]
            started = dict(message(fields.get(7, b""))).get(1) == 1
            found.append((fields.get(2, 0), values, started))
    return found


def scalars(folder, tag):
    """What TensorBoard shows: a session that starts at a step drops what was said from there on before."""
    shown = []
    for step, values, started in events(folder):
        if started:
            shown = [point for point in shown if point[0] < step]
        if tag in values:
            shown.append((step, values[tag]))
    return shown


def test_checksums_are_those_of_the_standard():
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    for data in (b"", b"a", os.urandom(77)):
        assert crc32c(data) == crc_by_division(data)
        assert unmask(masked(crc32c(data))) == crc32c(data)


def test_a_record_and_an_event_are_read_back():
    body = scalars_event(1.7e9, 300, {"train/loss": 0.25, "größe": -math.inf})
    assert list(records(record(body) + record(b""))) == [body, b""]
    fields = dict(message(body))
    assert (fields[1], fields[2]) == (1.7e9, 300)
    assert [dict(message(v)) for _, v in message(fields[5])] == [
        {1: b"train/loss", 2: 0.25}, {1: "größe".encode(), 2: -math.inf},
    ]  # fmt: skip


def test_two_files_of_one_moment_have_two_names(tmp_path):
    one, two = EventFile(tmp_path), EventFile(tmp_path)
    assert one.path != two.path
    one.close()
    two.close()


def test_the_log_has_what_the_trainer_knows(tmp_path):
    trainer = make(tmp_path, schedule="linear", log_every=4)
    trainer.train(epochs=2)
    found = entries(tmp_path)
    assert [(e["step"], e["loss"]) for e in found] == trainer.losses
    assert [e["step"] for e in found] == [4, 6, 8, 12], "every four steps, and where an epoch ends"
    assert [e["epoch"] for e in found] == [1, 1, 2, 2]
    assert found[0]["lr"] == pytest.approx(1e-2 * (1 - 3 / 12))
    for e in found:
        assert e["samples_per_s"] > 0
        assert e["memory_bytes"] > 10**7
        assert "tokens_per_s" not in e
        assert "mfu" not in e
    assert [("grad_norm" in e) for e in found] == [True, False, True, True], "known at the step of a regular point"
    epochs = entries(tmp_path, "epoch")
    assert [e["val_loss"] for e in epochs] == [h["val_loss"] for h in trainer.history]

    loss = scalars(tmp_path / "log", "train/loss")
    assert [step for step, _ in loss] == [4, 6, 8, 12]
    assert [value for _, value in loss] == pytest.approx([e["loss"] for e in found], rel=1e-6)
    assert [s for s, _ in scalars(tmp_path / "log", "epoch/val_accuracy")] == [6, 12]
    assert {t for _, values, _ in events(tmp_path / "log") for t in values} >= {"train/lr", "train/grad_norm"}


def test_the_norm_is_that_of_the_gradients(tmp_path):
    class Norm(Callback):
        def __init__(self):
            self.seen = {}

        def on_step_end(self, trainer):
            grads = [p.grad.flatten() for p in trainer.model.parameters()]
            self.seen[trainer.step] = float(torch.cat(grads).norm())

    norm = Norm()
    make(tmp_path, callbacks=[norm], clip_grad_norm=1e6, log_every=1).train(epochs=1)
    for e in entries(tmp_path):
        assert e["grad_norm"] == pytest.approx(norm.seen[e["step"]], rel=1e-5)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, input_ids):
        return self.out(self.table(input_ids).mean(1))


def test_tokens_are_counted_where_there_are_tokens(tmp_path):
    loader = [({"input_ids": torch.randint(0, 7, (4, 5))}, torch.tensor([0, 1, 0, 1])) for _ in range(4)]
    make(tmp_path, model=Tokens(), loader=loader).train(epochs=1)
    for e in entries(tmp_path):
        assert e["tokens_per_s"] == pytest.approx(5 * e["samples_per_s"], rel=1e-3)
    assert tokens_in(torch.zeros(3, 4)) == 0
    assert tokens_in(torch.zeros(3, 4, dtype=torch.int32)) == 12
    assert tokens_in(torch.zeros(3, 4, 2, dtype=torch.uint8)) == 0


def test_logging_changes_no_bit(tmp_path):
    with_log, without = make(tmp_path, seed=1), make(tmp_path, seed=1, log_dir=None)
    for trainer in (with_log, without):
        trainer.train(epochs=2)
    assert with_log.losses == without.losses
    assert all(torch.equal(a, b) for a, b in zip(with_log.model.parameters(), without.model.parameters(), strict=True))


def test_a_resumed_run_goes_on_without_gap_or_duplicate(tmp_path):
    saving = {"save_dir": str(tmp_path / "run"), "save_every_steps": 3, "keep_last": None, "seed": 1, "log_every": 1}
    whole = make(tmp_path / "whole", **{**saving, "save_dir": None})
    whole.train(epochs=2)
    make(tmp_path, **saving).train(epochs=2)
    log = tmp_path / "log" / NAME
    with log.open("a") as file:
        file.write('{"kind": "step", "st')  # as a kill leaves it
    again = make(tmp_path, **{**saving, "save_dir": str(tmp_path / "other")})
    again.resume(tmp_path / "run" / "step-00000003")
    again.train(epochs=2)
    assert [(e["step"], e["loss"]) for e in entries(tmp_path)] == whole.losses
    assert [e["epoch"] for e in entries(tmp_path, "epoch")] == [1, 2]
    shown = scalars(tmp_path / "log", "train/loss")
    assert shown == scalars(tmp_path / "whole" / "log", "train/loss")
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 12


def test_a_run_that_begins_again_before_its_first_checkpoint_begins_its_log_again(tmp_path):
    save = {"save_dir": str(tmp_path / "run")}

    class Dies(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 5:
                raise SystemExit

    with pytest.raises(SystemExit):
        make(tmp_path, callbacks=[Dies()], **save).train(epochs=1)
    assert [e["step"] for e in entries(tmp_path)] == [2, 4]
    with pytest.raises(ConfigError, match=r"log of another run.*up to step 4.*resume"):
        make(tmp_path, **save).train(epochs=1)
    again = make(tmp_path, **save)
    assert again.resume(missing_ok=True) is None
    again.train(epochs=1)
    assert [e["step"] for e in entries(tmp_path)] == [2, 4, 6]


def test_a_second_run_of_one_trainer_goes_on_in_its_log(tmp_path):
    trainer = make(tmp_path)
    trainer.train(epochs=1)
    trainer.train(epochs=1)
    assert [e["step"] for e in entries(tmp_path)] == [2, 4, 6, 8, 10, 12]
    assert len(scalars(tmp_path / "log", "train/loss")) == 6


def test_a_directory_that_cannot_be_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "log").write_text("a file")
    trainer = make(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written to"):
        trainer.train(epochs=1)
    assert trainer.step == 0


def test_a_disk_that_refuses_the_log_does_not_end_the_run(tmp_path, monkeypatch):
    real = RunLog.write

    def full(self, entry, scalars):
        if entry["step"] == 4:
            monkeypatch.setattr(os, "write", lambda *_: 3)
        real(self, entry, scalars)

    monkeypatch.setattr(RunLog, "write", full)
    trainer = make(tmp_path)
    with pytest.warns(RuntimeWarning, match="the log ends here, training goes on"):
        report = trainer.train(epochs=1)
    assert trainer.step == 6
    assert ("the rest of the log", "the disk refused step 4: only a part of") in [
        (w, y[:39]) for w, y in report.skipped
    ]


def test_the_first_rates_of_a_resumed_run_are_its_own(tmp_path, monkeypatch):
    import deepseek_r1.train._watch as watch

    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])

    class Ticks(Callback):
        def on_step_end(self, trainer):
            clock[0] += 2.0

    save = {"save_dir": str(tmp_path / "run"), "save_every_steps": 1, "log_every": 1}
    make(tmp_path, [Ticks()], **save).train(epochs=1)
    again = make(tmp_path, [Ticks()], **save)
    again.resume()
    shown = []
    monkeypatch.setattr(watch.Watch, "_draw", lambda self: shown.append(self._note()))
    again.train(epochs=2)
    assert [e["step"] for e in entries(tmp_path)] == list(range(1, 13))
    assert {e["samples_per_s"] for e in entries(tmp_path)} == {2.0}, "four samples in two seconds"
    assert "2.00 samples/s" in shown[0]
