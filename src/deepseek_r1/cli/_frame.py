"""What every verb shares: options, exit codes, one-line errors, and where a Report goes. Imports nothing heavy.

Exit codes: 0 done, 1 a check failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import json as json_format
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..core import CheckFailedError, DeepSeekError, InputError, NonFiniteLossError, Report, atomic

F = TypeVar("F", bound=Callable[..., Any])

DONE, CHECK_FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
#: What an installation without torch has not; every verb that needs it says so.
_NOT_IN_SLIM = ("torch", "scipy", "safetensors", "onnx", "onnxscript", "matplotlib", "sklearn")
_SHOW_TRACEBACK = [False]

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - is standard output.")
]
Html = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page with figures.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def new_app(**settings: Any) -> typer.Typer:
    """A typer application whose help is fast to make and the same on every terminal."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "terminal_width": 100},
        **settings,
    )


def show_traceback(on: bool) -> None:
    """Whether errors are printed with Python's traceback (option `--traceback`)."""
    _SHOW_TRACEBACK[0] = on


def with_sections(report: Report) -> None:
    """Print the reports of the steps a verb took, then its own: the last line says where the result is."""
    for part in (*report.sections, report):
        part.print()


def verb(show: Callable[[Report], None] = Report.print) -> Callable[[F], F]:
    """Make a command of a function that returns a Report: print it, write `--json` and `--html`, set the exit code."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, json: str | None = None, **kwargs: Any) -> None:
            html = kwargs.pop("html", None)
            try:
                _check_targets(json, html)
                with contextlib.redirect_stdout(sys.stderr) if json == "-" else contextlib.nullcontext():
                    report = function(*args, **kwargs)
                _deliver(report, json, html, show)
            except CheckFailedError as e:
                if e.report is not None:
                    _deliver(e.report, json, html, show)
                _fail(e, "check failed", CHECK_FAILED)
            except NonFiniteLossError as e:
                _fail(e, "check failed", CHECK_FAILED)
            except ModuleNotFoundError as e:
                if e.name not in _NOT_IN_SLIM:
                    raise
                _fail(
                    f"this needs {e.name}, which is not installed. Run: pip install deepseek-r1", "error", WRONG_USE, e
                )
            except (DeepSeekError, OSError) as e:
                _fail(e, "error", WRONG_USE)
            except KeyboardInterrupt as e:
                _fail(e, "interrupted", INTERRUPTED)
            if not report.ok:
                typer.echo(f"check failed: {', '.join(c.name for c in report.failed)}", err=True)
                raise typer.Exit(CHECK_FAILED)

        return command  # type: ignore[return-value]

    return decorate


def _check_targets(json: str | None, html: str | None) -> None:
    # Known before the work starts: a path that cannot be written would waste hours of training.
    for option, name in (("--json", json), ("--html", html)):
        if name is not None and name != "-" and Path(name).is_dir():
            raise InputError(f"{option} {name}: that is a directory; give the name of a file.")
    if html is not None and not html.endswith(".html"):
        raise InputError(f"--html {html}: the name must end in .html.")


def _deliver(report: Report, json: str | None, html: str | None, show: Callable[[Report], None]) -> None:
    if html is not None:
        report.save(html)
    if json == "-":
        typer.echo(json_format.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        return
    if json is not None:
        atomic.write_json(json, report.to_dict())
    show(report)


def _fail(what: BaseException | str, head: str, code: int, error: BaseException | None = None) -> None:
    cause = what if isinstance(what, BaseException) else error
    if _SHOW_TRACEBACK[0] and cause is not None:
        traceback.print_exception(cause)
    detail = str(what).strip()
    typer.echo(f"{head}: {detail}" if detail else head, err=True)
    raise typer.Exit(code) from cause
