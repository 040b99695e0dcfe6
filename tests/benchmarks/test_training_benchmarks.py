"""Benchmarks of training: every line runs in tiny shapes; what is stored is added to; verdicts follow from numbers."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from tables import TABLES, for_each, from_page
from training import all as every
from training import cases, contestants, loss, memory, page, step

CPU = torch.device("cpu")
ABOUT = {
    "hardware": {"cpu": "a CPU", "cores": 2, "system": "Linux-6", "gpus": []}, "versions": {"torch": "2"},
    "date": "2026-11-24T00:00:00+00:00", "device": "cpu",
}  # fmt: skip


def _rows(out: Path) -> dict:
    return json.loads(out.read_text())["rows"]


def _step(out: Path, *more: str) -> None:
    given = ["--only", "lstm-tagger", "--contestants", "by hand", "--device", "cpu", "--small", "--out", str(out)]
    assert step.main([*given, *more]) == 0


def test_runs_are_added_until_there_are_enough(tmp_path):
    out = tmp_path / "rows.json"
    _step(out, "--rounds", "1")
    first = _rows(out)["lstm-tagger"]["by hand"]
    assert len(first["all_samples_s"]) == 1
    _step(out, "--rounds", "1")
    assert _rows(out)["lstm-tagger"]["by hand"] == first, "nothing was missing"
    _step(out, "--rounds", "3")
    now = _rows(out)["lstm-tagger"]["by hand"]
    assert now["all_samples_s"][0] == first["samples_s"]
    assert len(now["all_samples_s"]) == 3
    assert now["samples_s"] == sorted(now["all_samples_s"])[1]
    _step(out, "--rounds", "1", "--since", "2999-01-01")
    assert len(_rows(out)["lstm-tagger"]["by hand"]["all_samples_s"]) == 1, "what is too old does not count"


def test_a_failure_is_part_of_the_row_and_is_not_tried_again(tmp_path, monkeypatch):
    def fails(case, clock):
        raise ModuleNotFoundError("No module named 'peft'")

    case = cases.Case(torch.nn.Identity, lambda i: (torch.zeros(1), 0), 2, contestants={"theirs": fails})
    monkeypatch.setattr(step, "cases", lambda small: {"one": case})
    out = tmp_path / "rows.json"
    given = ["--only", "one", "--device", "cpu", "--small", "--out", str(out)]
    step.main(given)
    entry = _rows(out)["one"]["theirs"]
    assert entry["failed"] == "ModuleNotFoundError: No module named 'peft'"
    assert not step.lacking({"theirs": entry}, "theirs", 3)


def test_a_run_that_fails_later_leaves_what_was_measured():
    good = step.joined({}, {"samples_s": 2.0, "warm_s": 1.0, "notes": [], "peak_gb": 3.0})
    worse = step.joined(good, {"failed": "OutOfMemoryError: no"})
    assert (worse["samples_s"], worse["peak_gb"], worse["failed"]) == (2.0, 3.0, "OutOfMemoryError: no")


def _options(folder: Path, **changes) -> argparse.Namespace:
    fixed = {"device": "cpu", "small": True, "folder": folder, "rounds": 1, "since": "", "only": ""}
    return argparse.Namespace(**fixed | changes)


def test_the_most_important_cells_come_first_and_what_is_there_is_left_out(tmp_path):
    found = every.cells(_options(tmp_path))
    names = [cell.name for cell in found]
    assert names[:4] == ["gpt2-16x1024", "bert-32x128", "llama-4x4096", "bert-128x512"]
    assert set(cases.cases(True)) < set(names)
    order = [names.index(name) for name in (cases.LORA, "resnet-152", "memory-narrow-llama", "loss")]
    assert order == sorted(order)
    assert all(cell.lacks() for cell in found)
    _step(tmp_path / step.RESULT.name, "--rounds", "1")
    (tagger,) = every.cells(_options(tmp_path, only="lstm-tagger"))
    assert tagger.lacks() == ["hugging face", "ours"]
    assert "missing: hugging face, ours" in every.listed([tagger])
    (later,) = every.cells(_options(tmp_path, only="lstm-tagger", since="2999-01-01"))
    assert len(later.lacks()) == 3


def test_texts_can_be_learned_but_not_wholly():
    data = loss.texts(50, 32, 128, 30_000, seed=0)
    again = loss.texts(50, 32, 128, 30_000, seed=0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(data, again, strict=True))
    ids, labels = (torch.cat([batch[name] for batch in data]) for name in ("input_ids", "labels"))
    more = (ids == loss.WORDS[1]).sum(1) > (ids == loss.WORDS[0]).sum(1)
    assert 0.87 < (more == labels.bool()).float().mean() < 0.93, "one label in ten is wrong"
    assert 0.45 < labels.float().mean() < 0.55


def test_losses_are_kept_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(
        loss, "ours", lambda model, data, device: ([x + 1.0 for x in loss.plain(model, data, device)], [])
    )
    out = tmp_path / "loss.json"
    given = ["--device", "cpu", "--small", "--steps", "4", "--seeds", "0,1", "--out", str(out)]
    assert loss.main(given) == 1, "a loss that is higher by one is outside of the range"
    kept = json.loads(out.read_text())
    assert kept["verdict"]["difference"] == pytest.approx(1.0, abs=1e-4)
    monkeypatch.setattr(loss, "run", None)
    assert loss.main(given) == 1, "nothing is run again"
    text = from_page(page.loss)(kept)
    assert "**outside**" in text


def test_tables_of_adapters_say_whether_bars_are_kept():
    run = {"warm_s": 1.0, "notes": ["compile: 16 repeated blocks"]}
    row = {
        "hugging face": {"samples_s": 9.0, "peak_gb": 60.0, **run}, "ours": {"samples_s": 18.0, "peak_gb": 26.0, **run},
        "ours, nf4": {"samples_s": 10.0, "peak_gb": 24.0, **run}, "by hand": {"failed": "no peft"},
    }  # fmt: skip
    text = from_page(page.lora)(ABOUT | {"rows": {cases.LORA: row}})
    assert "36,864" in text
    assert "2.00 times the tokens a second of hugging face (bar: at least 1.8): kept" in text
    assert "0.56 times the tokens a second of ours (bar: at least 0.85): **missed**" in text
    assert "no peft" in text
    assert from_page(page.lora)(ABOUT | {"rows": {}}) == "Not measured."


def test_tables_of_steps_and_of_limits():
    found = {"rows": {"plain-vit": {"a": {"failed": "E: x"}, "ours": {"samples_s": 5.0, "warm_s": 1.0, "notes": []}}}}
    assert "| plain-vit | a | E: x |" in from_page(page.step)(ABOUT | found)
    rows = {"llama-4x4096": {"ours": {"samples_s": 15.0, "warm_s": 1.0, "notes": []}}}
    gpu = {"hardware": ABOUT["hardware"] | {"gpus": [{"name": "NVIDIA H200"}]}}
    # 7.41e9 for the parameters of each token, 1.61e9 for attention.
    assert "ours 61,440 (56%)" in from_page(page.step)(ABOUT | gpu | {"rows": rows})
    row = {"share": 0.5, "limit_gb": 1.0, "predicted_gb": 0.9, "real_gb": 0.91, "kept": True, "error": -0.01,
           "time": 1.1, "best_uniform": "every 2", "best_uniform_time": 1.3}  # fmt: skip
    result = {"rows": [row, {"share": 0.1, "limit_gb": 0.2, "refused": "too small"}], "everything_gb": 2.0,
              "alive_gb": 0.1, "same_gradients": {"0.5": True}}  # fmt: skip
    text = for_each(page.memory)({}, {"about": ABOUT, "results": {"gpt": result}})
    assert "every 2: 1.30" in text
    assert "kept in 1 of 1" in text
    assert "refused" in text
    assert {"training-step", "training-lora", "training-memory", "training-loss", "packing"} <= TABLES.keys()


def test_results_of_memory_are_joined(tmp_path, monkeypatch):
    def net():
        return torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()) for _ in range(4)))

    tiny = (net, lambda: (torch.randn(64, 32), torch.randn(64, 32)), "fp32")
    monkeypatch.setattr(memory, "cases", lambda device: {"tiny": tiny})
    out = tmp_path / "memory.json"
    old = {"rows": [], "everything_gb": 1.0, "alive_gb": 0.5, "same_gradients": {}}
    out.write_text(json.dumps({"about": {}, "results": {"old": old}}))
    memory.main(["--device", "cpu", "--shares", "1,0.01", "--rounds", "1", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert results["old"] == old
    assert [row["share"] for row in results["tiny"]["rows"]] == [1.0, 0.01]
    assert "| tiny | 1 |" in for_each(page.memory)({"about": ABOUT, "results": results})
    (cell,) = [c for c in every.cells(_options(tmp_path)) if c.name == "memory-tiny"]
    assert cell.missing({"results": results}) == []
    assert memory.result(CPU) != memory.result(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in cases.cases(True) if name != "hf-bert-32x128"])
def test_every_contestant_of_every_case_runs(name):
    pytest.importorskip("transformers")
    case = cases.cases(True)[name]
    for who in case.contestants:
        found = step.measured(case, who, CPU)
        missing = "failed" in found and ("accelerate" in found["failed"] or "peft" in found["failed"])
        assert missing or found["samples_s"] > 0, found


def test_the_clock_leaves_the_first_steps_out():
    clock = contestants.Clock(2, 3, CPU)
    assert [clock.step(number) for number in range(1, 6)] == [False, False, False, False, True]
    assert clock.seconds > 0
    assert clock.warm_s > 0
