"""The typer application and what all commands share: exit status and one-line errors."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kronfac.cli import info as info_command

app = typer.Typer(
    name="kronfac",
    help="Kronecker-factored curvature and Hessian spectra for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class UsageError(Exception):
    """Bad arguments or bad data: printed in one line, exit status 2."""


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


def run() -> None:
    """Run the application: status 0 when done, 2 for bad usage or data, 1 for a failed run."""
    try:
        app()
    except UsageError as error:
        print(f"kronfac: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("kronfac: interrupted", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:
        print(f"kronfac: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(1) from None
