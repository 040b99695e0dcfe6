"""Forks trainings from one warm process and ends them by signals; run as a program by test_training_recovery.py.

Reads jobs as JSON lines and answers each with a line: {"status": exit code, or minus the signal}. A job has

- folder, epochs, kind, fields: what is trained, and further fields of its configuration;
- call, when: SIGKILL at the call number `call` of those that touch the disk, "before" it, "after" it, or "half" done;
- ms, signal: a signal after so many milliseconds;
- twice: two SIGTERMs within the call number `call`.

A training that ends writes folder/result.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import killable

import deepseek_r1.train._checkpoint as disk


class Saboteur:
    """Counts the calls that touch the disk, and strikes at one of them."""

    def __init__(self, job):
        self.calls, self.at, self.when, self.twice = 0, job.get("call"), job.get("when"), job.get("twice")
        self.lock = threading.Lock()
        for owner, name in (
            (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (disk, "save_file"), (Path, "write_bytes"),
        ):  # fmt: skip
            setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def call(*args, **kwargs):
            with self.lock:
                self.calls += 1
                struck = self.calls == self.at
            if struck and self.twice:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            elif struck and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if struck and not self.twice:
                # Only what has no final name yet can be half written.
                files = [a for a in args if isinstance(a, Path) and a.is_file() and ".tmp" in str(a)]
                if self.when == "half" and files:
                    os.truncate(files[0], files[0].stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def train(job):
    saboteur = Saboteur(job)
    folder = Path(job["folder"])
    trainer = killable.make(
        folder, job["kind"], log_dir=str(folder / "log"), keep_last=2, keep_best=1, log_every=1, **job["fields"]
    )
    trainer.resume(missing_ok=True)
    trainer.train(job["epochs"])
    weights = hashlib.sha256(b"".join(t.numpy().tobytes() for t in trainer.model.state_dict().values()))
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in trainer.history]
    result = {"losses": trainer.losses, "history": history, "weights": weights.hexdigest(), "calls": saboteur.calls}
    (folder / "result.json").write_text(json.dumps(result))


def child(job):
    os.setsid()
    with open(job["folder"] + ".err", "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    code = 1
    try:
        train(job)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def warm_up():
    """What is imported at the first use is imported here, so that no child does it again."""
    with tempfile.TemporaryDirectory() as folder:
        killable.make(folder, "global", log_dir=folder, async_save=False).train(1)


def main():
    warnings.simplefilter("ignore")
    warm_up()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        if "ms" in job:
            time.sleep(job["ms"] / 1000)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, job["signal"])
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
