from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from kronfac.cli.errors import RunError
from kronfac.cli.output import to_json, write_atomically


def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"report\.json: cannot be written \(No space left on device\)"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left behind


def test_write_replaces(tmp_path: Path) -> None:
    path = tmp_path / "data"
    write_atomically(path, b"\x00\x01")
    write_atomically(path, "text")
    assert path.read_text() == "text"


def test_json_has_no_nan() -> None:
    text = to_json({"a": math.inf, "b": [1.5, math.nan, (2, "x")], "c": {"d": None, "e": True}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None, [2, "x"]],
        "c": {"d": None, "e": True},
    }
