"""The command line of the race."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import bench.autoencoder
from bench.autoencoder import race, summary
from bench.autoencoder.settings import TITLES, grid
from bench.process import ROOT, default_results

DATA_DIR = ROOT.parent / "shared" / "data" / "mnist"
FIGURE = ROOT / "docs" / "images" / "autoencoder.png"


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0: all there is to do is done, 1: it failed, 2: bad usage, 3: the budget ended first."""
    parser = _parser()
    options = parser.parse_args(arguments)
    results = options.results or default_results("autoencoder", options.threads)
    try:
        if options.command in (summary.GRID, summary.FINAL):
            return _run(parser, options, results)
        tuning = summary.read(results, summary.GRID, options.grid_minutes)
        final = summary.read(results, summary.FINAL, options.minutes)
        if options.command == "report":
            print(summary.markdown(tuning, final), end="")
        else:
            try:
                from bench.autoencoder import figure
            except ModuleNotFoundError as error:
                raise race.RaceError(f"{error}; run `pip install 'kronfac[plot]'`") from None
            for path in figure.draw(tuning, final, options.out):
                print(path)
    except (race.RaceError, ValueError, OSError) as error:
        print(f"autoencoder: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start again to go on", file=sys.stderr)
        return 3
    return 0


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, results: Path) -> int:
    methods = options.methods.split(",")
    if unknown := [method for method in methods if method not in TITLES]:
        parser.error(f"--methods: unknown method {unknown[0]!r}; expected some of {', '.join(TITLES)}")
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a number > 0, got {options.minutes:g}")
    if options.threads < 1:
        parser.error(f"--threads: expected a number >= 1, got {options.threads}")
    if not options.data_dir.is_dir():
        parser.error(f"--data-dir: {options.data_dir} is not a directory")
    settings = grid(methods) if options.command == summary.GRID else race.finals(results, methods, options.grid_minutes)
    how = race.Options(
        results=results,
        data_dir=options.data_dir,
        minutes=options.minutes,
        threads=options.threads,
        deadline=time.time() + 60 * options.budget,
        retries=options.retries,
        dry=options.dry_run,
    )
    return 0 if race.run_all(options.command, settings, how) else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.autoencoder",
        description=bench.autoencoder.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=2, help="per run (default 2)")
    common.add_argument("--results", type=Path, metavar="DIR", help="default: bench/results/autoencoder/<machine>")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--methods", default=",".join(TITLES), help="separated by commas; default: all")
    running.add_argument("--data-dir", type=Path, default=DATA_DIR, help="of MNIST (default ../shared/data/mnist)")
    running.add_argument("--budget", type=float, default=float("inf"), metavar="MINUTES", help="of this invocation")
    running.add_argument("--retries", type=int, default=1, help="how often a disturbed run is repeated (default 1)")
    running.add_argument("--dry-run", action="store_true", help="list the runs and what is there of them")
    grid_minutes: dict[str, Any] = {"type": float, "default": 4.0, "metavar": "MINUTES"}
    grid_minutes["help"] = "length of tuning runs (default 4)"
    final_minutes: dict[str, Any] = {"type": float, "default": 10.0, "metavar": "MINUTES"}
    final_minutes["help"] = "length of final runs (default 10)"
    one = commands.add_parser("grid", parents=[common, running], help="make the tuning runs that are missing")
    one.add_argument("--minutes", **grid_minutes)
    for name, text in (
        ("final", "run each method's best two settings again for longer"),
        ("report", "print the comparison as Markdown"),
        ("draw", "draw the figure"),
    ):
        parents = [common, running] if name == "final" else [common]
        command = commands.add_parser(name, parents=parents, help=text)
        command.add_argument("--minutes", **final_minutes)
        command.add_argument("--grid-minutes", **grid_minutes)
        if name == "draw":
            command.add_argument(
                "--out", type=Path, default=FIGURE, help="ends in .png or .svg; a dark one lies beside"
            )
    return parser
