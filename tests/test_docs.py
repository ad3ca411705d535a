"""Every ```python block of README.md and docs/ runs, in order, in one namespace per page."""

from __future__ import annotations

import importlib
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import kronfac
from kronfac.curvature import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED = (
    "kronfac.adversarial",
    "kronfac.curvature",
    "kronfac.operators",
    "kronfac.ops",
    "kronfac.optim",
    "kronfac.schedules",
    "kronfac.spectrum",
)
PYTHON, NOT_RUN = "python", "{.python .no-test}"

_FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?P<ticks>```+)(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)(?P=ticks)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: what follows the opening ticks, the text, and the number of its first line."""

    info: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks, those inside HTML comments (set-up that readers need not see) included."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["info"].strip(), textwrap.dedent(found["code"]), text.count("\n", 0, found.start("code")) + 1)
        for found in _FENCE.finditer(text)
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_PYTHON = [page for page in PAGES if any(block.info == PYTHON for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))  # an example may register its own
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    with torch.random.fork_rng(devices=[]):
        for block in blocks(page):
            if block.info == PYTHON:
                # Blank lines in front: a traceback then shows the line of the page.
                source = "\n" * (block.line - 1) + block.code
                exec(compile(source, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fences_are_understood(page: Path) -> None:
    found = blocks(page)
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(found), "a fence is not closed"
    for block in found:
        # What the site does not know it prints as text, ticks included, and says nothing.
        assert block.info in (PYTHON, NOT_RUN, "console", "text", ""), f"line {block.line}: {block.info!r}"


def test_few_examples_are_not_run() -> None:
    left_out = [f"{name(page)}:{block.line}" for page in PAGES for block in blocks(page) if block.info == NOT_RUN]
    assert len(left_out) <= 2, f"each must be one that cannot run here: {left_out}"


def test_index_begins_like_the_readme() -> None:
    pages = [blocks(ROOT / page) for page in ("README.md", "docs/index.md")]
    first, same = (next(block.code for block in page if "kronfac.KFAC(" in block.code) for page in pages)
    assert first == same


@pytest.mark.parametrize("module", DOCUMENTED)
def test_api_page_lists_every_public_name(module: str) -> None:
    page = ROOT / "docs" / "api" / f"{module.rpartition('.')[2]}.md"
    listed = [resolve(path) for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)]
    for public, value in public_names(module).items():
        assert any(value is one for one in listed), f"{module}.{public} is missing in {name(page)}"


def test_api_overview_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api" / "kronfac.md").read_text(encoding="utf-8")
    assert all(public in text for public in kronfac.__all__)


def public_names(module: str) -> dict[str, Any]:
    """The names in `__all__`, or without one those that are imported under their own name."""
    imported = importlib.import_module(module)
    names = getattr(imported, "__all__", None) or [
        n for n, v in vars(imported).items() if not n.startswith("_") and callable(v)
    ]
    return {n: getattr(imported, n) for n in names}


def resolve(path: str) -> Any:
    """The object that mkdocstrings documents under a path: modules first, as in the files."""
    parts = path.split(".")
    value: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        try:
            value = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            value = getattr(value, part)
    assert not isinstance(value, ModuleType), f"{path} is a module: name the function in it, {path}.{parts[-1]}"
    return value
