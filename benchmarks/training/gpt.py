"""A GPT of 12 M parameters on the plays of Shakespeare, on a CPU: the Trainer against a loop by hand.

    python benchmarks/training gpt [--rounds 12] [--steps 10] [--batch 8] [--fresh] [--out FILE]

The loop is what somebody who minds every millisecond writes: gradients set to None, AdamW in torch's fused form with
weight decay on matrices alone, no logs, no checks, losses read after the last step. The Trainer has its defaults.
Both train the same model from the same weights on the same batches, each through its own library's loader, at the same
precision, with torch's own number of threads.

A round is so many steps by each of three: the loop, the loop again, the Trainer, each in a process of its own, so that
none finds memory that another has left. They take turns in every order in turn; those that wait do nothing. The second
loop against the first shows what the method can tell apart. Every round begins with the first weights, an empty
optimizer and batches of its own, so each is a measurement by itself: a run that was broken off goes on with the next
round (`--fresh` begins anew), and losses must be equal to the bit. What is timed is the whole call: for the Trainer
the run's set-up and its Report too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import deepseek_r1 as dr1
from deepseek_r1.core import atomic
from deepseek_r1.models import GPT2, GPT2Config, num_parameters
from deepseek_r1.train import decay_groups
from quantization import corpora

RESULT = Path(__file__).parents[1] / "results" / "training_gpt.json"
VOCABULARY, CONTEXT = 4096, 256
LR, DECAY = 3e-4, 0.01
NAMES = ("loop", "loop again", "trainer")
Round = dict[str, dict[str, float]]
#: Rounds that nothing is kept of: the first allocations, the first use of every kernel.
WARM = 1
#: Written down before the runs. The first run had everything in one process and gave 0.962 (quartiles 0.926 to 1.002;
#: the loop against itself 1.014, 0.970 to 1.066). A profile then had no time in the Trainer: the check costs 1.5 ms of
#: a step of 900 ms. What differed was page faults, some 25,000 a step, in memory that one contestant took from another.
EXPECTED = (
    {
        "trainer_over_loop": 0.985,
        "why": "one more pass over 49 MB of gradients, which looks for values that are not finite, in a step of half a "
        "second; all else that the Trainer does is microseconds",
    },
    {
        "trainer_over_loop": 1.05,
        "why": "each contestant has a process of its own, and the Trainer now keeps freed memory in the process while "
        "it trains on a CPU: no page faults, which were 40 to 80 ms of a step in a trial",
    },
)


class Rows(Dataset[dict[str, Tensor]]):
    """Pieces of the plays, each its own labels."""

    def __init__(self, tokens: Tensor, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(tokens) - CONTEXT, (count,), generator=draw)
        self._rows = tokens[starts[:, None] + torch.arange(CONTEXT)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def network() -> GPT2:
    """GPT-2 with 6 blocks of width 384, without dropout."""
    torch.manual_seed(0)
    return GPT2(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=384, n_layer=6, n_head=6,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


class Loop:
    """A bare PyTorch loop."""

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(decay_groups(model, DECAY), lr=LR, fused=True)

    def prepare(self, rows: Rows, batch: int) -> None:
        self._loader = DataLoader(rows, batch, shuffle=True, generator=torch.Generator().manual_seed(0))

    def run(self) -> float:
        """The mean loss of a pass."""
        self.model.train()
        losses = []
        for batch in self._loader:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model(**batch)["loss"]
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).double().mean())


class Ours:
    """The Trainer."""

    def __init__(self, model: GPT2) -> None:
        self.model = model

    def prepare(self, rows: Rows, batch: int) -> None:
        loader = dr1.DSDataLoader(rows, batch, shuffle=True, generator=torch.Generator().manual_seed(0))
        config = dr1.TrainingConfig(weight_decay=DECAY, precision="fp32")
        self._trainer = dr1.Trainer(self.model, loader, lr=LR, config=config)
        self.optimizer = self._trainer.optimizer

    def run(self) -> float:
        """The mean loss of a pass."""
        self._trainer.train(epochs=1)
        return float(self._trainer.history[-1]["train_loss"])


def serve(name: str, line: Connection) -> None:
    """A contestant's process: for every `(rows, batch)` that comes, what the run took; ends at None."""
    model = network()
    first = copy.deepcopy(model.state_dict())
    contestant = Ours(model) if name == "trainer" else Loop(model)
    while (task := line.recv()) is not None:
        model.load_state_dict(first)
        contestant.prepare(*task)
        contestant.optimizer.state.clear()
        gc.collect()
        wall, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        loss = contestant.run()
        wall, then = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
        system = then.ru_stime - used.ru_stime
        line.send({
            "s": wall, "cpu_s": then.ru_utime - used.ru_utime + system, "system_cpu_s": system,
            "page_faults": then.ru_minflt - used.ru_minflt, "loss": loss, "peak_mb": then.ru_maxrss / 1024,
        })  # fmt: skip


@contextlib.contextmanager
def contestants(names: tuple[str, ...]) -> Iterator[dict[str, Connection]]:
    """A process for each, and the line to it."""
    context = multiprocessing.get_context("spawn")
    lines, processes = {}, []
    for name in names:
        lines[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    try:
        yield lines
        for line in lines.values():
            line.send(None)
    finally:
        for process in processes:
            process.join(10)


def one_round(lines: dict[str, Connection], rows: Rows, batch: int, order: tuple[str, ...]) -> Round:
    """Every contestant once, in this order."""
    found = {}
    for name in order:
        lines[name].send((rows, batch))
        found[name] = lines[name].recv()
    return {name: found[name] for name in NAMES}


def ratio(rounds: list[Round], of: str, over: str, key: str) -> dict[str, float]:
    """How many times as fast `of` is as `over`: median and quartiles over the rounds."""
    low, middle, high = statistics.quantiles([r[over][key] / r[of][key] for r in rounds], n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def summary(rounds: list[Round], tokens: int) -> dict[str, Any]:
    """Rates and ratios of all rounds so far."""
    found: dict[str, Any] = {
        "tokens_s": {n: tokens / statistics.median(r[n]["s"] for r in rounds) for n in NAMES},
        **{
            key: {n: statistics.median(r[n][key] for r in rounds) for n in NAMES}
            for key in ("cpu_s", "system_cpu_s", "page_faults")
        },
        "peak_mb": {n: max(r[n]["peak_mb"] for r in rounds) for n in NAMES},
        "largest_difference_of_losses": max(
            abs(r["loop"]["loss"] - r[n]["loss"]) for r in rounds for n in ("trainer", "loop again")
        ),
    }
    if len(rounds) >= 2:
        for name in ("loop again", "trainer"):
            found[f"{name} over loop"] = {key: ratio(rounds, name, "loop", key) for key in ("s", "cpu_s")}
    return found


def kept(out: Path, arguments: dict[str, int], fresh: bool) -> list[Round]:
    """The rounds of a run with the same arguments that was broken off."""
    if fresh or not out.is_file():
        return []
    old = json.loads(out.read_text())
    return list(old["rounds"]) if old["arguments"] == arguments else []


def main(arguments: list[str]) -> int:
    """The `gpt` verb."""
    parser = argparse.ArgumentParser(prog="gpt", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    setting = {"steps": options.steps, "batch": options.batch, "context": CONTEXT, "vocabulary": VOCABULARY}
    rounds = kept(options.out, setting, options.fresh)
    text = corpora.tokens("train", VOCABULARY)
    orders = list(itertools.permutations(NAMES))
    missing = options.rounds - len(rounds)
    about_model = {"parameters": num_parameters(network()), "precision": "fp32", "tokens_of_corpus": len(text)}
    with contestants(NAMES) as lines:
        for number in range(-WARM if missing > 0 else 0, missing):
            place = len(rounds)
            rows = Rows(text, options.steps * options.batch, seed=place)
            found = one_round(lines, rows, options.batch, orders[place % len(orders)])
            print("warm-up" if number < 0 else f"round {place + 1}", json.dumps(found), flush=True)
            if number < 0:
                continue
            rounds.append(found)
            atomic.write_json(options.out, {
                "schema_version": 1, **about("cpu"), "arguments": setting, "expected": EXPECTED, **about_model,
                "summary": summary(rounds, options.steps * options.batch * CONTEXT), "rounds": rounds,
            })  # fmt: skip
    print(json.dumps(summary(rounds, options.steps * options.batch * CONTEXT), indent=2))
    return 0
