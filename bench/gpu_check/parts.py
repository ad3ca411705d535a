"""The parts: each runs programs of its own and returns what they found."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.gpu_check import machine
from bench.gpu_check.files import read_json
from bench.process import ROOT

LIMIT = 560.0
"""Seconds of a part: machines are lent for commands of ten minutes."""
TAIL = 4000
"""Characters of a program's output that a failure is recorded with."""

# What may stand in the way in a large environment: an editable install of kronfac, which answers before the folder on
# PYTHONPATH is asked, and a package that brings its tests as `tests`, which wins over our folder without __init__.py.
SITE_CUSTOMIZE = f"""import importlib.util
import sys
import types

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
found = importlib.util.find_spec("tests")
if found is not None and found.origin is not None:
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [{str(ROOT / "tests")!r}]
"""


class PartError(Exception):
    """A part did not do what it should; `found` is what it found nevertheless."""

    def __init__(self, message: str, found: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.found = dict(found or {})


@dataclass
class Place:
    """Where a run of the command keeps its files, and how long it has.

    Attributes:
        state: folder of records and of what is built.
        groups: of benchmarks; none names all.
        deadline: of the running part, on the monotonic clock.
    """

    state: Path
    groups: Sequence[str] = ()
    deadline: float = field(default_factory=lambda: time.monotonic() + LIMIT)

    @property
    def site(self) -> Path:
        """What `build` installs kronfac into."""
        return self.state / "site"

    def environment(self, **more: str) -> dict[str, str]:
        """Of a program that is to import that kronfac, from wherever it runs."""
        path = os.pathsep.join((str(self.site), str(ROOT)))
        return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | more


@dataclass(frozen=True)
class Run:
    """How a program ended; it was stopped when `status` is None."""

    status: int | None
    output: str
    seconds: float

    def reason(self) -> str:
        """Its end, in words, with the end of its output."""
        how = "ran past its time" if self.status is None else f"exit status {self.status}"
        return f"{how}: {self.output[-TAIL:].strip()}"


def run(command: Sequence[str], place: Place, **environment: str) -> Run:
    """Run a program in the checkout and show what it says; its whole process group ends when the part's time does."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=place.environment(**environment), stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(max(1.0, place.deadline - start))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = log.read()
    print(output[-TAIL:], flush=True)
    return Run(status, output, time.monotonic() - start)


def build(place: Place) -> dict[str, Any]:
    """Compile and install into `place.site`, then import from there."""
    compiler = machine.nvcc()
    if compiler is None:
        raise PartError("no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    site = str(place.site)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps"]
    command += ["--upgrade", "--target", site, "-C", f"build-dir={place.state / 'objects'}"]
    command += ["-C", "cmake.define.KRONFAC_CUDA=ON", "."]
    done = run(command, place, CUDACXX=compiler, PYTHONPATH="", PIP_DISABLE_PIP_VERSION_CHECK="1")
    if done.status != 0:
        raise PartError(f"pip install: {done.reason()}")
    (place.site / "sitecustomize.py").write_text(SITE_CUSTOMIZE, encoding="utf-8")
    check_import(place)
    return {"seconds": done.seconds, "nvcc": compiler}


def check_import(place: Place) -> None:
    """Kronfac comes from `place.site` and has its operators for CUDA tensors."""
    program = (
        "import sys; from pathlib import Path; from kronfac import _library\n"
        "files = {name: Path(file).resolve() for name, file in _library.LOADED.items()}\n"
        "site = Path(sys.argv[1]).resolve()\n"
        "assert '_ops_cuda' in files, f'operators for CUDA are not loaded: {_library.FAILED or files}'\n"
        "assert all(file.is_relative_to(site) for file in files.values()), f'not from {site}: {files}'"
    )
    done = run([sys.executable, "-c", program, str(place.site)], place)
    if done.status != 0:
        raise PartError(f"importing kronfac: {done.reason()}")


def operators(place: Place) -> dict[str, Any]:
    """The operator tests on CUDA tensors, then those of the CUDA library."""
    check_import(place)
    found = {
        "tests/ops": tests(place, ["tests/ops"], KRONFAC_DEVICE="cuda"),
        "tests/cuda": tests(place, ["tests/cuda"]),
    }
    return judge(found)


def kfac(place: Place) -> dict[str, Any]:
    """K-FAC on the GPU."""
    check_import(place)
    name = "tests/optim/test_cuda.py"
    if not (ROOT / name).is_file():
        raise PartError(f"{name} is not in this checkout")
    return judge({name: tests(place, [name])})


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """What several runs of tests found, or `PartError` where one was not green."""
    wrong = [f"{name}: {result['message']}" for name, result in found.items() if result["message"]]
    if wrong:
        raise PartError("; ".join(wrong), {"tests": found})
    return {"tests": found}


def tests(place: Place, paths: Sequence[str], **environment: str) -> dict[str, Any]:
    """Run pytest in several processes and count; `message` is empty where all is well."""
    report = place.state / "junit.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "-m", "not slow"]
    workers = min(8, len(os.sched_getaffinity(0)))
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    done = run([*command, *paths], place, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", **environment)
    found: dict[str, Any] = {"seconds": done.seconds} | (counts(report) if report.is_file() else {})
    ran = found.get("tests", 0) - found.get("skipped", 0)
    found["message"] = "" if done.status == 0 and ran > 0 else f"{ran} tests ran; {done.reason()}"
    return found


def counts(report: Path) -> dict[str, Any]:
    """Numbers of tests and the first failures from a JUnit file."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except ElementTree.ParseError:
        return {}
    found: dict[str, Any] = {
        name: sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    failed = []
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            failed.append(f"{case.get('classname')}::{case.get('name')}: {(outcome.get('message') or '')[:300]}")
    return found | {"failed": failed[:30]}


SMALL_CASES = re.compile(r"^small cases: (\d+) right$", re.MULTILINE)
SANITIZERS = {
    # torch asks the runtime for things that may fail, and goes on; what fails here shows in the results.
    "memcheck": [["--report-api-errors", "no"]],
    # Libraries synchronise in ways that racecheck does not follow: only our kernels are judged by it.
    "racecheck": [["--kernel-regex", "kns=kronfac"], ["--kernel-name", "kns=kronfac"]],
}
"""Tools, and the options that are tried one after another, before none."""
SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)


def sanitizer(place: Place) -> dict[str, Any]:
    """Memcheck and racecheck; each tensor is an allocation of its own, whose end is the end of what may be read."""
    tool = compute_sanitizer()
    if tool is None:
        raise PartError("no compute-sanitizer: it comes with the CUDA toolkit; put it on the path or set CUDA_HOME")
    check_import(place)
    found: dict[str, Any] = {}
    for name, wishes in SANITIZERS.items():
        done = None
        for options in (*wishes, []):
            command = [tool, "--tool", name, "--error-exitcode", "9", *options]
            done = run([*command, sys.executable, "-m", "bench.gpu_check.small_cases"], place,
                       PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
            if done.status is None or "small cases" in done.output:  # otherwise it does not know the option
                break
        assert done is not None
        cases, summary = SMALL_CASES.search(done.output), SUMMARY.findall(done.output)
        found[name] = {
            "seconds": done.seconds,
            "cases": int(cases[1]) if cases else 0,
            "options": options,
            "summary": summary[-1] if summary else None,
            "message": "" if done.status == 0 and cases and summary else done.reason(),
        }
    wrong = [f"{name}: {result['message']}" for name, result in found.items() if result["message"]]
    if wrong:
        raise PartError("; ".join(wrong), {"tools": found})
    return {"tools": found}


def compute_sanitizer() -> str | None:
    """The program, on the path or in the toolkit."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    for place in (home / "bin", home / "compute-sanitizer"):
        if (place / "compute-sanitizer").is_file():
            return str(place / "compute-sanitizer")
    return None


def bench(place: Place) -> dict[str, Any]:
    """Each group of cases in a process of its own: an error of the device ends a process, and only that group.

    Where only some groups are asked for, what the others found before is kept, if device and sources are the same.
    """
    from bench.gpu_check.groups import GROUPS

    check_import(place)
    found: dict[str, Any] = {"peaks": None, "results": [], "steps": [], "groups": {}}
    wrong = []
    for group in GROUPS:
        target = place.state / f"bench-{group}.json"
        done = None
        if not place.groups or group in place.groups:
            target.unlink(missing_ok=True)
            done = run([sys.executable, "-m", "bench.gpu_check.measure", group, str(target)], place)
        content = read_json(target) or {}
        if done is None and content.get("about") != machine.about():
            continue
        found["peaks"] = content.get("peaks") or found["peaks"]
        found["results"] += content.get("results", [])
        found["steps"] += content.get("steps", [])
        bad = [f"{case['op']}[{case['case']}]: {case['message']}" for case in content.get("failed", [])]
        if done is not None and done.status != 0 and not bad:
            bad = [done.reason()]
        found["groups"][group] = {"seconds": None if done is None else done.seconds, "failed": bad}
        wrong += [f"{group}: {message}" for message in bad]
    if wrong:
        raise PartError("; ".join(wrong), found)
    return found


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "build": build,
    "operators": operators,
    "kfac": kfac,
    "sanitizer": sanitizer,
    "bench": bench,
}
