"""What every verb shares: options, exit codes, one-line errors, and where a Report goes. Imports nothing heavy.

Exit codes: 0 done, 1 a check failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json as json_format
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..core import CheckFailedError, DeepSeekError, InputError, NonFiniteLossError, Report, atomic
from ..core.userfile import place, told
from ._targets import check_out, check_report

F = TypeVar("F", bound=Callable[..., Any])

DONE, CHECK_FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
#: What an installation without torch has not; every verb that needs it says so.
_NOT_IN_SLIM = ("torch", "scipy", "safetensors", "onnx", "onnxscript", "matplotlib", "sklearn")
_SHOW_TRACEBACK = [False]
#: What to do about an error of the file system.
_ADVICE = {
    errno.ENOSPC: ". Free space, or give another place.",
    errno.EACCES: ". Give another place, or its permissions.",
    errno.EROFS: ". Give another place: nothing can be written there.",
}

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


def verb(show: Callable[[Report], None] = Report.print, *, endings: tuple[str, ...] | None = None) -> Callable[[F], F]:
    """Make a command of a function that returns a Report: print it, write `--json` and `--html`, set the exit code.

    Args:
        show: prints the report.
        endings: what the option `--out` may be; see `check_out`.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, json: str | None = None, **kwargs: Any) -> None:
            html = kwargs.pop("html", None)
            with _exit_codes():
                _check_targets(json, html, kwargs.get("out"), endings)
                try:
                    with contextlib.redirect_stdout(sys.stderr) if json == "-" else contextlib.nullcontext():
                        report = function(*args, **kwargs)
                except (DeepSeekError, OSError) as e:
                    # What was measured before the error is not lost with it.
                    if isinstance(found := getattr(e, "report", None), Report):
                        _deliver(found, json, html, show)
                    raise
                _deliver(report, json, html, show)
            if not report.ok:
                typer.echo(f"check failed: {', '.join(c.name for c in report.failed)}", err=True)
                raise typer.Exit(CHECK_FAILED)

        return command  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Errors become one line and an exit code. A bug of this package keeps its traceback."""
    try:
        yield
    except (CheckFailedError, NonFiniteLossError) as e:
        _fail(e, "check failed", CHECK_FAILED)
    except DeepSeekError as e:
        _fail(e, "error", WRONG_USE)
    except OSError as e:
        _fail(f"{e}{_ADVICE.get(e.errno or 0, '')}", "error", WRONG_USE, e)
    except KeyboardInterrupt as e:
        _fail(e, "interrupted", INTERRUPTED)
    except (Exception, SystemExit) as e:
        if isinstance(e, ModuleNotFoundError) and e.name in _NOT_IN_SLIM:
            _fail(f"this needs {e.name}, which is not installed. Run: pip install deepseek-r1", "error", WRONG_USE, e)
        if not place(e):
            raise
        _fail(told(e), "error", WRONG_USE, e)


def _check_targets(json: str | None, html: str | None, out: Path | None, endings: tuple[str, ...] | None) -> None:
    if json is not None and json != "-":
        check_report("--json", json)
    if html is not None:
        check_report("--html", html, ending=".html")
    if out is not None:
        check_out(out, endings)


def _deliver(report: Report, json: str | None, html: str | None, show: Callable[[Report], None]) -> None:
    # First what cannot fail: the table is there even if the disk is full.
    if json == "-":
        typer.echo(json_format.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        show(report)
    if json is not None and json != "-":
        with _said("--json", json):
            atomic.write_json(json, report.to_dict())
    if html is not None:
        with _said("--html", html):
            report.save(html)


@contextlib.contextmanager
def _said(option: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise InputError(
            f"{option} {name} could not be written: {e.strerror or e}. The report itself is printed, and the command's "
            "other files are whole; free space or give another name."
        ) from e


def _fail(what: BaseException | str, head: str, code: int, error: BaseException | None = None) -> None:
    cause = what if isinstance(what, BaseException) else error
    if _SHOW_TRACEBACK[0] and cause is not None:
        traceback.print_exception(cause)
    detail = str(what).strip()
    typer.echo(f"{head}: {detail}" if detail else head, err=True)
    raise typer.Exit(code) from cause
