"""Entry point of the `kronfac` command; `python -m kronfac.cli` is the same."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say in one line which extra it needs."""
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print("kronfac: the command line needs typer; run `pip install 'kronfac[demo]'`", file=sys.stderr)
        raise SystemExit(1) from None
    from kronfac.cli.main import run

    run()


if __name__ == "__main__":
    main()
