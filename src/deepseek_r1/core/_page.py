"""A Report as one self-contained HTML page: no script, no outside file; figures are inline SVG by matplotlib."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .report import Plot, Report, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.5rem;margin:0 0 .2rem} h2{font-size:1.1rem;margin:2rem 0 .6rem}
.meta{color:#57606a;font-size:.9rem}
table{border-collapse:collapse;width:100%} th,td{padding:.4rem .6rem;border-bottom:1px solid #d8dee4;text-align:left}
th{background:#f6f8fa;font-weight:600} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.wide{overflow-x:auto}
td.how{color:#57606a;font-size:.9rem}
.pass{color:#116329;font-weight:600} .fail{color:#a40e26;font-weight:700}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:1.2rem}
figure{margin:0;border:1px solid #d8dee4;border-radius:6px;padding:.6rem} figure svg{width:100%;height:auto}
figcaption{color:#57606a;font-size:.9rem}
ul{padding-left:1.2rem} ul.checks{list-style:none;padding-left:0}
details{margin-top:2.5rem;border-top:2px solid #d8dee4;padding-top:.8rem}
summary{font-size:1.25rem;font-weight:600;cursor:pointer}
"""
_COLOURS = ["#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#1b7c83"]


def page(report: Report) -> str:
    """The whole page as text."""
    body = [f"<h1>{_e(report.title)}</h1>", f'<p class="meta">{_e(_meta(report))}</p>', *_content(report)]
    for section in report.sections:
        content = _content(section, known=report.facts)
        body += [f"<details open><summary>{_e(section.title)}</summary>", *content, "</details>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{_e(report.title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _content(report: Report, known: Mapping[str, Any] | None = None) -> list[str]:
    """Everything but the title; facts that are `known` from further up the page are not said again."""
    body: list[str] = []
    if report.rows:
        body += ["<h2>Measured</h2>", _rows(report)]
    if report.checks:
        items = "".join(
            f'<li><span class="{"pass" if c.passed else "fail"}">{"pass" if c.passed else "FAIL"}</span> '
            f"{_e(c.name)}{': ' + _e(c.detail) if c.detail else ''}</li>"
            for c in report.checks
        )
        body += ["<h2>Checks</h2>", f'<ul class="checks">{items}</ul>']
    if report.plots:
        figures = "".join(_figure(plot) for plot in report.plots)
        body += ["<h2>Figures</h2>", f'<div class="figures">{figures}</div>']
    if report.skipped:
        items = "".join(f"<li>{_e(what)}: {_e(why)}</li>" for what, why in report.skipped)
        body += ["<h2>Skipped</h2>", f"<ul>{items}</ul>"]
    if report.notes:
        body += ["<h2>Notes</h2>", "<ul>" + "".join(f"<li>{_e(n)}</li>" for n in report.notes) + "</ul>"]
    facts = {k: v for k, v in report.facts.items() if known is None or known.get(k) != v}
    if facts:
        items = "".join(f"<tr><td>{_e(k)}</td><td>{_e(_fact(v))}</td></tr>" for k, v in facts.items())
        body += ["<h2>Where it ran</h2>", _wide(f"<table>{items}</table>")]
    return body


def _e(value: Any) -> str:
    return html.escape(str(value))


def _meta(report: Report) -> str:
    verdict = "all checks passed" if report.ok else f"{len(report.failed)} check(s) failed"
    when = report.created.replace("T", " ").replace("+00:00", " UTC")
    return f"{when} · {verdict}" if report.checks else when


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {format_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(format_value(v) for v in value)
    return format_value(value)


def _rows(report: Report) -> str:
    has_before = any(row.before is not None for row in report.rows)
    head = "<th>metric</th>" + ('<th class="n">before</th>' if has_before else "")
    head += '<th class="n">after</th><th>unit</th><th>how measured</th>'
    lines = []
    for row in report.rows:
        before = f'<td class="n">{_e(format_value(row.before))}</td>' if has_before else ""
        lines.append(
            f'<tr><td>{_e(row.metric)}</td>{before}<td class="n">{_e(format_value(row.after))}</td>'
            f'<td>{_e(row.unit)}</td><td class="how">{_e(row.how)}</td></tr>'
        )
    return _wide(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")


def _wide(table: str) -> str:
    # In a narrow window the table scrolls and the page does not.
    return f'<div class="wide">{table}</div>'


def _figure(plot: Plot) -> str:
    alt = plot.caption or plot.title
    caption = f"<figcaption>{_e(plot.caption)}</figcaption>" if plot.caption else ""
    svg = _svg(plot).replace("<svg ", f'<svg role="img" aria-label="{_e(alt)}" ', 1)
    return f"<figure>{svg}{caption}</figure>"


def _svg(plot: Plot) -> str:
    # Here, because a report without figures is written where there is no matplotlib, too.
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt and no date make the same report give the same bytes.
    settings: Any = {"svg.hashsalt": "deepseek-r1"}
    settings |= {"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.6, 3.9), layout="constrained")
        axes = figure.add_subplot()
        _DRAW[plot.kind](axes, plot)
        axes.set_title(plot.title, fontsize=11, loc="left")
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _line(axes: Axes, plot: Plot) -> None:
    for i, (name, points) in enumerate(plot.series.items()):
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, color=_COLOURS[i % 6], marker=".")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _scatter(axes: Axes, plot: Plot) -> None:
    names = iter(plot.labels)
    for i, (name, points) in enumerate(plot.series.items()):
        sizes = [p[2] if len(p) > 2 else 60 for p in points]
        axes.scatter([p[0] for p in points], [p[1] for p in points], s=sizes, color=_COLOURS[i % 6])
        # A key with points of all sizes would cover the figure; the names stand beside the points.
        for point, size in zip(points, sizes):
            words = [w for w in (name if len(plot.series) > 1 else "", next(names, "")) if w]
            below = -(size**0.5) / 2 - 4
            axes.annotate(
                "\n".join(words), point[:2], xytext=(0, below), textcoords="offset points", ha="center", va="top",
                fontsize=9,
            )  # fmt: skip
    axes.margins(0.3, 0.45)
    axes.grid(alpha=0.3)
    _keep_within(axes, plot)


def _keep_within(axes: Axes, plot: Plot) -> None:
    """No axis goes where no value can be: below zero, or above 100 %."""
    values = [point for points in plot.series.values() for point in points]
    if all(v[0] >= 0 for v in values):
        axes.set_xlim(left=0)
    if "%" in plot.y_label and all(v[1] <= 100 for v in values):
        axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))


def _histogram(axes: Axes, plot: Plot) -> None:
    everything = sorted(v for values in plot.series.values() for v in values)
    if not everything:
        raise ConfigError(f"the histogram {plot.title!r} has no values.")
    # The slowest hundredth would squeeze everything else into one bar.
    top = everything[min(len(everything) - 1, int(len(everything) * 0.99))]
    low, high = everything[0], max(top, everything[0] * 1.001 + 1e-12)
    # Rivals that lie ten times apart would each be one bar on a linear axis.
    spread = low > 0 and high / low > 10
    edges = [low * (high / low) ** (k / 60) if spread else low + (high - low) * k / 60 for k in range(61)]
    edges[-1] = high
    for i, (name, values) in enumerate(plot.series.items()):
        clipped = [min(v, high) for v in values]
        axes.hist(clipped, bins=edges, alpha=0.6, label=name, color=_COLOURS[i % 6])
    if spread:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _bar(axes: Axes, plot: Plot) -> None:
    for i, (name, values) in enumerate(plot.series.items()):
        axes.bar([name], [values[0]], color=_COLOURS[i % 6])
    axes.grid(alpha=0.3, axis="y")


def _matrix(axes: Axes, plot: Plot) -> None:
    rows = next(iter(plot.series.values()))
    image = [[v**0.5 for v in row] for row in rows]
    axes.imshow(image, cmap="Blues", aspect="auto")
    largest = max((v for row in rows for v in row), default=0)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value and len(rows) <= 20:
                colour = "white" if value > largest * 0.4 else "black"
                axes.text(j, i, f"{value:g}", ha="center", va="center", fontsize=8, color=colour)
    if plot.labels:
        axes.set_xticks(range(len(plot.labels)), plot.labels)
        axes.set_yticks(range(len(plot.labels)), plot.labels)


_DRAW = {"line": _line, "scatter": _scatter, "histogram": _histogram, "bar": _bar, "matrix": _matrix}
