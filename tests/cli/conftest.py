from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kronfac.cli.main import run


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    @property
    def message(self) -> str:
        """The error line, which must be the only one."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("kronfac: ")
        return lines[0].removeprefix("kronfac: ")


Kronfac = Callable[..., Outcome]


@pytest.fixture
def kronfac(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kronfac:
    """Runs the command line in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kronfac", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run()
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    return call
