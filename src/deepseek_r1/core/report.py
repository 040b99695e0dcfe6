"""`Report`: what a verb measured, what it skipped and why, and whether its checks passed.

Prints as a table (rich), saves as JSON and as one self-contained HTML page. Knows nothing about models.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import atomic
from .errors import ArtifactError, ConfigError

SCHEMA_VERSION = 1
PLOT_KINDS = ("line", "histogram", "scatter", "matrix", "bar")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity.

    Attributes:
        metric: what was measured ("latency, batch 1").
        before: the value of the plain thing, or None where there is none.
        after: the value now.
        unit: unit of both values ("ms"), empty for pure numbers.
        how: how it was measured, in a few words.
    """

    metric: str
    after: Any
    before: Any = None
    unit: str = ""
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition that had to hold, and whether it did."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Data of one figure; how it is drawn is the page's business.

    Attributes:
        kind: "line" and "scatter" (series: name -> [[x, y], ...]), "histogram" (name -> [values]),
            "bar" (name -> [value]), "matrix" (name -> rows of one matrix).
        labels: tick labels of a matrix, or point labels of a scatter plot in the order of its series.
        caption: one sentence on what to see; also the picture's text alternative.
    """

    kind: str
    title: str
    series: dict[str, list[Any]]
    x_label: str = ""
    y_label: str = ""
    labels: list[str] = field(default_factory=list)
    caption: str = ""

    def __post_init__(self) -> None:
        if self.kind not in PLOT_KINDS:
            raise ConfigError(f"Plot(kind={self.kind!r}): one of {', '.join(PLOT_KINDS)} is needed.")


@dataclass
class Report:
    """Rows, checks, notes, skipped things and plots of one verb, and the reports of the verbs it called.

    Example:
        >>> r = Report("demo")
        >>> r.add("latency", 1.5, before=3.0, unit="ms", how="median of 50")
        >>> r["latency"].after
        1.5
        >>> r.ok
        True
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    sections: list[Report] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def add(self, metric: str, after: Any, *, before: Any = None, unit: str = "", how: str = "") -> None:
        """Add a row."""
        self.rows.append(Row(metric=metric, after=after, before=before, unit=unit, how=how))

    def check(self, name: str, passed: bool, detail: str = "") -> bool:
        """Record a check; returns whether it passed."""
        self.checks.append(Check(name=name, passed=bool(passed), detail=detail))
        return bool(passed)

    def note(self, text: str) -> None:
        """Add a sentence the reader should see."""
        self.notes.append(text)

    def skip(self, what: str, why: str) -> None:
        """Say that something was not done, and why."""
        self.skipped.append((what, why))

    def plot(self, kind: str, title: str, series: dict[str, list[Any]], **more: Any) -> None:
        """Add the data of one figure; see `Plot`."""
        self.plots.append(Plot(kind=kind, title=title, series=series, **more))

    @property
    def ok(self) -> bool:
        """Whether no check failed, here or in a section."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed, those of the sections too."""
        return [c for c in self.checks if not c.passed] + [c for s in self.sections for c in s.failed]

    def __getitem__(self, metric: str) -> Row:
        for row in self.rows:
            if row.metric == metric:
                return row
        raise KeyError(f"no row {metric!r} in the report {self.title!r}; rows: {[r.metric for r in self.rows]}")

    def __contains__(self, metric: object) -> bool:
        return any(row.metric == metric for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON (numbers that are not finite become strings)."""
        data = {**asdict(replace(self, sections=[])), "sections": [s.to_dict() for s in self.sections]}
        data["skipped"] = [{"what": what, "why": why} for what, why in self.skipped]
        plain: dict[str, Any] = _plain({"schema_version": SCHEMA_VERSION, "ok": self.ok, **data})
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that `to_dict` described.

        Raises:
            ArtifactError: not a report, or one of a later version.
        """
        if not isinstance(data, dict) or "schema_version" not in data or "rows" not in data:
            raise ArtifactError("not a report: no schema_version and rows in it.")
        if not isinstance(data["schema_version"], int) or data["schema_version"] > SCHEMA_VERSION:
            raise ArtifactError(
                f"the report has schema version {data['schema_version']!r}; this release reads up to {SCHEMA_VERSION}. "
                "Update deepseek-r1."
            )
        try:
            return cls._filled(data)
        except (KeyError, TypeError, AttributeError, ConfigError) as e:
            raise ArtifactError(f"the report lacks or misstates a field: {e!r}.") from e

    @classmethod
    def _filled(cls, data: dict[str, Any]) -> Report:
        return cls(
            title=data["title"],
            rows=[Row(**row) for row in data["rows"]],
            checks=[Check(**check) for check in data["checks"]],
            notes=list(data["notes"]),
            skipped=[(s["what"], s["why"]) for s in data["skipped"]],
            plots=[Plot(**plot) for plot in data["plots"]],
            facts=dict(data["facts"]),
            sections=[cls.from_dict(section) for section in data.get("sections", [])],
            created=data["created"],
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, or as an HTML page if `path` ends in `.html`; whole or not at all.

        Raises:
            ConfigError: another ending.
        """
        target = Path(path)
        if target.suffix == ".json":
            atomic.write_json(target, self.to_dict())
        elif target.suffix == ".html":
            from ._page import page

            atomic.write_bytes(target, page(self).encode())
        else:
            raise ConfigError(f"Report.save({str(target)!r}): the name must end in .json or .html.")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report written by `save(... .json)`. Raises ArtifactError if it is not one."""
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as e:
            raise ArtifactError(f"{path}: not a report (no JSON: {e}).") from e
        return cls.from_dict(data)

    def __rich__(self) -> Any:
        from ._table import render

        return render(self)

    def __str__(self) -> str:
        from ._table import text

        return text(self)

    def print(self) -> None:
        """Print the report on standard output."""
        from ._table import show

        show(self)


def format_value(value: Any) -> str:
    """A value as people read it: four significant digits, no exponent where avoidable.

    Example:
        >>> format_value(0.99444), format_value(1234567), format_value(2.3e-7), format_value(None)
        ('0.9944', '1,234,567', '2.3e-07', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
