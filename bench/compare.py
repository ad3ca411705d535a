"""Times the operators of two commits by turns, and refuses to where the operator tests of either are red.

    python bench/compare.py REV_A REV_B [--op covariance] [--threads 1,2] [--quick] [--json FILE]

Each revision (anything git names, or `worktree` for the files as they lie here) is exported, built and installed into
an environment of its own that borrows torch and the tools from the Python running this. Each is tested with its own
tests; both are timed with the cases of this checkout.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKTREE = "worktree"
WORKER = Path(__file__).resolve().with_name("worker.py")


class RefusedError(Exception):
    """There is nothing to report; the message says why."""


@dataclass(frozen=True)
class Side:
    """One revision, built.

    Attributes:
        name: what the user called it.
        source: its files.
        python: the interpreter that has it installed.
    """

    name: str
    source: Path
    python: Path


class Worker:
    """A process that measures one side when asked; a context manager."""

    def __init__(self, python: Path) -> None:
        self._process = subprocess.Popen(
            [python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; reading says so
        line = self._process.stdout.readline()
        if not line:
            raise RefusedError(
                f"the measuring process of one side ended with status {self._process.wait()}; see its message above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def environment() -> dict[str, str]:
    """What a side's Python runs with: nothing that makes it import another kronfac."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def export(revision: str, directory: Path) -> Path:
    """Write the files of a revision into `directory` and return it.

    Raises:
        RefusedError: git does not know the revision.
    """
    directory.mkdir(parents=True)
    if revision == WORKTREE:
        listing = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
        for name in filter(None, listing.split("\0")):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)
        return directory
    with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", revision))) as archive:
        archive.extractall(directory, filter="data")
    return directory


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if done.returncode != 0:
        raise RefusedError(f"git {' '.join(arguments)}: {' '.join(done.stderr.decode().split())}")
    return done.stdout


def build(name: str, source: Path, directory: Path) -> Side:
    """Build a wheel of `source` and install it into a fresh environment under `directory`.

    Raises:
        RefusedError: it does not build; the message ends with the end of the build's output.
    """
    wheels = directory / "wheels"
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, source], name)
    home = directory / "environment"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(home)
    python = home / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    # A path file inside a directory that is itself named by a path file is not read: torch and the tools come along,
    # an editable kronfac of the borrowed environment does not.
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    wheel = next(wheels.glob("kronfac-*.whl"))
    _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, wheel], name)
    return Side(name, source, python)


def _run(command: Sequence[object], name: str) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RefusedError(f"{name} does not build:\n{(done.stdout + done.stderr)[-3000:]}")


def run_tests(side: Side) -> str | None:
    """Run the side's own operator tests with its own operators; None where they pass, else the end of their output."""
    done = subprocess.run(
        [side.python, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "tests/ops"],
        cwd=side.source,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    # pytest also answers with a status other than 0 where it found no test: untested is not green.
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]


def measure(
    sides: Sequence[Side], keys: Sequence[str], threads: Sequence[int], rounds: int, sample_seconds: float
) -> list[dict[str, Any]]:
    """Time the cases on both sides by turns, A B B A, one process each, never both at once.

    Returns:
        Per case and number of threads: whether both results are correct, the seconds of each side, and the ratio of
        the first to the second with the quartiles of the ratios within the rounds.
    """
    from kronfac.cli.bench.measure import Timing, ratio

    entries = []
    with Worker(sides[0].python) as first, Worker(sides[1].python) as second:
        workers = (first, second)
        for count in threads:
            for key in keys:
                states = [worker.ask(prepare=key, threads=count, sample_seconds=sample_seconds) for worker in workers]
                samples: tuple[list[float], list[float]] = ([], [])
                for number in range(rounds):
                    # A B, B A: the two run nearly the same code, and going first must not decide.
                    for side in (0, 1) if number % 2 == 0 else (1, 0):
                        samples[side].append(workers[side].ask(sample=True)["seconds"])
                a, b = (Timing(tuple(collected)) for collected in samples)
                speedup = ratio(a, b)
                entries.append(
                    {
                        "case": key,
                        "threads": count,
                        "correct": all(state["correct"] for state in states),
                        "errors": [state["errors"]["kronfac"] for state in states],
                        "seconds": [a.median, b.median],
                        "samples": [list(a.samples), list(b.samples)],
                        "speedup": speedup.value,
                        "speedup_quartiles": [speedup.low, speedup.high],
                    }
                )
    return entries


def compare(
    sides: Sequence[Side],
    timing: Callable[[], list[dict[str, Any]]],
    check: Callable[[Side], str | None] = run_tests,
) -> list[dict[str, Any]]:
    """Test both sides, and only then time them.

    Raises:
        RefusedError: tests are red, or a result is wrong on the inputs that were timed.
    """
    red = [(side, output) for side in sides if (output := check(side)) is not None]
    if red:
        details = "\n".join(f"--- {side.name} ---\n{output}" for side, output in red)
        raise RefusedError(
            f"the operator tests of {' and '.join(side.name for side, _ in red)} are red; no times\n{details}"
        )
    entries = timing()
    wrong = [entry["case"] for entry in entries if not entry["correct"]]
    if wrong:
        raise RefusedError(f"wrong results, whose times mean nothing: {', '.join(dict.fromkeys(wrong))}")
    return entries


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, build, test, time and print; the exit status is 1 where there is nothing to report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REV")
    parser.add_argument("--op", action="append", default=[], help="only this operator; may be repeated")
    parser.add_argument("--threads", default="1", help="numbers of threads, separated by commas")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few small cases: checks the harness")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)

    from kronfac.cli.bench import machine
    from kronfac.cli.bench.cases import select
    from kronfac.cli.bench.report import seconds

    try:
        keys = [case.key for case in select(options.op, quick=options.quick)]
        threads = [int(part) for part in options.threads.split(",")]
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="kronfac-compare-") as scratch:
        try:
            sides = []
            for label, revision in zip("ab", options.revisions, strict=True):
                print(f"building {revision}", flush=True)
                home = Path(scratch) / label
                sides.append(build(revision, export(revision, home / "source"), home))
            print("running the operator tests of both", flush=True)
            entries = compare(
                sides, lambda: measure(sides, keys, threads, 3 if options.quick else options.rounds, 0.01)
            )
        except RefusedError as reason:
            print(f"compare: {reason}", file=sys.stderr)
            return 1
    print(f"{'case':<44}  thr  {options.revisions[0]:>12}  {options.revisions[1]:>12}  speed-up (quartiles)")
    for entry in entries:
        a, b = map(seconds, entry["seconds"])
        low, high = entry["speedup_quartiles"]
        gain = f"{entry['speedup']:.2f}x ({low:.2f}-{high:.2f})"
        print(f"{entry['case']:<44}  {entry['threads']:<3}  {a:>12}  {b:>12}  {gain}")
    if options.json is not None:
        content = {"machine": machine.describe(), "revisions": options.revisions, "results": entries}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
