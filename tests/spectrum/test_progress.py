"""`progress=True`: a bar with tqdm, lines without it, and nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kronfac.operators import ggn
from kronfac.spectrum import _progress, block_traces, diagonal, eigsh, trace
from tests.linalg.matrices import with_spectrum
from tests.operators.cases import make_case

_CASE = make_case("mlp")
_MATRIX = with_spectrum([3.0, 2.0, 1.0] + [0.1] * 37)

USES: dict[str, Callable[..., Any]] = {
    "eigsh": lambda progress: eigsh(_MATRIX, 2, progress=progress),
    "trace": lambda progress: trace(_MATRIX, probes=20, progress=progress),
    "diagonal": lambda progress: diagonal(_MATRIX, "xdiag", probes=20, progress=progress),
    "block_traces": lambda progress: block_traces(
        ggn(_CASE.model, _CASE.loss_fn, (_CASE.inputs, _CASE.targets)), probes=20, progress=progress
    ),
}


@pytest.mark.parametrize("use", USES)
def test_bar(use: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    done: list[int] = []
    USES[use](lambda count, total: done.append(count))
    USES[use](True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("\r" + use)
    assert f"{done[-1]}product" in err or f" {done[-1]}/" in err
    assert err.endswith("\n")


@pytest.mark.parametrize("use", USES)
def test_lines_where_tqdm_is_missing(
    use: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    done: list[tuple[int, int | None]] = []
    USES[use](lambda *counts: done.append(counts))
    USES[use](True)
    count, total = done[-1]
    expected = f"{use}: {count} products, " if total is None else f"{use}: {count} of {total} products, "
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(expected)
    assert err.count("\n") == 1


def test_lines_between(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(_progress, "_SECONDS", 0.0)
    done: list[int] = []
    eigsh(_MATRIX, 2, progress=lambda count, total: done.append(count))
    eigsh(_MATRIX, 2, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"eigsh: {count} products" for count in done]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("progress", [None, False])
def test_silence(use: str, progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    USES[use](progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("use", USES)
def test_refusals(use: str) -> None:
    for wrong in ("yes", 1, torch.ones(1)):
        with pytest.raises(TypeError, match=rf"kronfac.spectrum.{use}: progress: expected a function"):
            USES[use](wrong)
