"""How a race is run: what `optimize(race=...)` takes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..core import ConfigError
from ..data import TASKS
from ..graph import PASSES


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """How candidates are built, judged and timed.

    Attributes:
        task: what the first output is for, which decides how the accuracy of a lower precision is judged: "auto"
            takes it for the scores of classes if there are class labels, or no labels and an output [rows, at least
            2]; "classes" takes it for scores along its last dimension; "values" (embeddings, say) compares the
            numbers themselves.
        isolated: build and time each candidate in a child process, so that its crash, hang or hunger for memory costs
            the candidate only. What cannot travel there (an engine registered in this process, an operator written in
            Python, a model on several kinds of devices) is raced in this process, and the report says so.
        timeout_s: a candidate that takes longer to build, or to answer once, is out.
        memory_gb: resident memory at which a child is ended; None for four fifths of what is free when it starts.
        rounds: timed rounds of the final, and of the last rung among the best; the first takes a tenth of them, at
            least eight.
        seconds: about how long the final may take; the first rung may take as long and the last one half of it. None
            has less than five rounds.
        passes: names from `graph.PASSES` that rivals are simplified with; None for all, () for none.
        cache: keep the choice and the compiled files for the next time, and look there first. A path names another
            directory than the user's own cache.

    Example:
        >>> RaceConfig(timeout_s=60).rounds
        60
    """

    task: str = "auto"
    isolated: bool = True
    timeout_s: float = 900.0
    memory_gb: float | None = None
    rounds: int = 60
    seconds: float = 8.0
    passes: tuple[str, ...] | None = None
    cache: bool | str | os.PathLike[str] = True

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"RaceConfig(task={self.task!r}): one of {', '.join(TASKS)} is needed.")
        for name in ("timeout_s", "memory_gb", "seconds"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"RaceConfig({name}={value!r}): a number above 0 is needed.")
        if unknown := sorted(set(self.passes or ()) - set(PASSES)):
            raise ConfigError(f"RaceConfig(passes=...): no pass {unknown[0]!r}; there are {', '.join(PASSES)}.")
        if not isinstance(self.rounds, int) or self.rounds < 5:
            raise ConfigError(f"RaceConfig(rounds={self.rounds!r}): at least 5 rounds are needed.")
