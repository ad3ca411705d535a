"""The command line of the comparison."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import bench.large_batch
from bench.large_batch import driver, summary
from bench.large_batch.settings import TITLES, Plan, all_settings
from bench.process import ROOT, RunError, default_results

DATA_DIR = ROOT.parent / "shared" / "data" / "mnist"
FIGURE = ROOT / "docs" / "images" / "large-batch.png"


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0: all there is to do is done, 1: it failed, 2: bad usage, 3: the budget ended first."""
    parser = _parser()
    options = parser.parse_args(arguments)
    results = options.results or default_results("large_batch", options.threads)
    plan = _plan(parser, options)
    try:
        if options.command == "run":
            return _run(parser, options, results, plan)
        records = summary.read(results, plan)
        if options.command == "report":
            print(summary.markdown(records, plan), end="")
        else:
            try:
                from bench.large_batch import figure
            except ModuleNotFoundError as error:
                raise RunError(f"{error}; run `pip install 'kronfac[plot]'`") from None
            for path in figure.draw(records, options.out):
                print(path)
    except (RunError, ValueError, OSError) as error:
        print(f"large_batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start again to go on", file=sys.stderr)
        return 3
    return 0


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, results: Path, plan: Plan) -> int:
    methods = options.methods.split(",")
    if unknown := [method for method in methods if method not in TITLES]:
        parser.error(f"--methods: unknown method {unknown[0]!r}; expected some of {', '.join(TITLES)}")
    for name in ("threads", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected a number >= 1, got {getattr(options, name)}")
    if not options.data_dir.is_dir():
        parser.error(f"--data-dir: {options.data_dir} is not a directory")
    how = driver.Options(
        results=results,
        data_dir=options.data_dir,
        plan=plan,
        threads=options.threads,
        workers=options.workers,
        deadline=time.time() + 60 * options.budget,
        dry=options.dry_run,
    )
    return 0 if driver.run_all(all_settings(plan, methods), how) else 3


def _plan(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Plan:
    plan = Plan()
    seeds = plan.seeds if options.seeds is None else tuple(range(options.seeds))
    if not seeds:
        parser.error("--seeds: expected a number >= 1, got 0")
    batches = plan.batches
    if options.batches is not None:
        try:
            batches = tuple(int(text) for text in options.batches.split(","))
        except ValueError:
            parser.error(f"--batches: expected numbers separated by commas, got {options.batches!r}")
    examples = plan.examples if options.examples is None else options.examples
    wrong = [batch for batch in batches if not plan.base_batch <= batch <= examples]
    if wrong:
        parser.error(f"--batches: expected {plan.base_batch} to {examples} (--examples), got {wrong[0]}")
    return replace(plan, seeds=seeds, batches=batches, examples=examples)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.large_batch",
        description=bench.large_batch.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=1, help="per run (default 1)")
    common.add_argument("--results", type=Path, metavar="DIR", help="default: bench/results/large_batch/<machine>")
    common.add_argument("--seeds", type=int, metavar="N", help="how many (default 3)")
    common.add_argument("--batches", help="separated by commas (default 256,1024,4096,16384)")
    common.add_argument("--examples", type=int, metavar="N", help="of the training split (default 60000)")
    one = commands.add_parser("run", parents=[common], help="make the runs that are missing")
    one.add_argument("--methods", default=",".join(TITLES), help="separated by commas; default: all")
    one.add_argument("--data-dir", type=Path, default=DATA_DIR, help="of MNIST (default ../shared/data/mnist)")
    one.add_argument("--workers", type=int, default=1, help="runs at a time (default 1)")
    one.add_argument("--budget", type=float, default=float("inf"), metavar="MINUTES", help="of this invocation")
    one.add_argument("--dry-run", action="store_true", help="list the runs and what is there of them")
    commands.add_parser("report", parents=[common], help="print the tables as Markdown")
    draw = commands.add_parser("draw", parents=[common], help="draw the figure")
    draw.add_argument("--out", type=Path, default=FIGURE, help="ends in .png or .svg; a dark one lies beside")
    return parser
