"""The typer application and what all commands share: exit status and one-line errors."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer

from kronfac.cli import info as info_command
from kronfac.cli.bench.command import bench
from kronfac.cli.demo import demo
from kronfac.cli.errors import UsageError, one_line
from kronfac.cli.spectrum import spectrum
from kronfac.cli.train import train

_TYPER_INTERRUPTED = 130  # what some versions of typer return in place of letting KeyboardInterrupt through

app = typer.Typer(
    name="kronfac",
    help="Kronecker-factored curvature and Hessian spectra for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import kronfac

        typer.echo(kronfac.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Kronecker-factored curvature and Hessian spectra for PyTorch."""


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions, instruction set, threads, build flags and the libraries in use."""
    facts = info_command.collect()
    typer.echo(json.dumps(facts, indent=2) if as_json else info_command.render(facts))


app.command()(demo)
app.command()(train)
app.command()(spectrum)
app.command()(bench)


def run() -> None:
    """Run the application: status 0 when done, 2 for bad usage or data, 1 for a failed run."""
    warnings.showwarning = _show_warning
    try:
        # Not standalone: typer would print its own errors over several lines.
        status = app(standalone_mode=False)
    except UsageError as error:
        _fail(one_line(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 1)
    except RuntimeError as error:
        _fail("interrupted" if isinstance(error, typer.Abort) else one_line(error), 1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail_parsing(error)
    else:
        if status == _TYPER_INTERRUPTED:
            _fail("interrupted", 1)
        raise SystemExit(status if isinstance(status, int) else 0)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, without the place in the source that Python would add."""
    print(f"kronfac: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail_parsing(error: Any) -> None:
    """Print what typer found wrong with the command line: in one line, or the help where nothing was given."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(error.exit_code)
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    _fail(" ".join(error.format_message().split()) + hint, error.exit_code)


def _fail(message: str, status: int) -> None:
    print(f"kronfac: {message.removeprefix('kronfac: ')}", file=sys.stderr)
    raise SystemExit(status) from None
