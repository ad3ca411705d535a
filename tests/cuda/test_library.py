"""The CUDA operators as a library: loaded only with a torch that has CUDA, and clear about what is missing."""

from __future__ import annotations

import re
import struct
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kronfac import _library
from kronfac.cli.info import collect


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_left_aside_without_cuda() -> None:
    assert "_ops_cuda" not in _library.LOADED
    assert "_ops_cuda" not in _library.FAILED
    built = find_spec("kronfac._ops_cuda") is not None
    assert collect()["cuda"]["operators"] == ("in this build, not loaded" if built else "not in this build")


FATBIN = struct.pack("<IHH", 0xBA55ED50, 1, 16)
"""How a fat binary begins: magic number, version, size of this header. The size of all that follows is next."""


def codes(fatbin: bytes) -> set[str]:
    """What a fat binary holds: kind 1 is PTX, 2 machine code; each entry names its size and architecture."""
    found, at = set(), 0
    while at < len(fatbin):
        kind, _, header, size = struct.unpack_from("<HHIQ", fatbin, at)
        (architecture,) = struct.unpack_from("<I", fatbin, at + 28)
        found.add(f"{'ptx' if kind == 1 else 'sm'}_{architecture}")
        at += header + size
    return found


def test_code_for_both_architectures_and_later_ones() -> None:
    spec = find_spec("kronfac._ops_cuda")
    if spec is None or spec.origin is None:
        pytest.skip("no CUDA operators in this build")
    library = Path(spec.origin).read_bytes()
    starts = [found.start() for found in re.finditer(re.escape(FATBIN), library)]
    assert starts
    for start in starts:
        (size,) = struct.unpack_from("<Q", library, start + 8)
        assert codes(library[start + 16 : start + 16 + size]) == {"sm_80", "sm_90", "ptx_90"}


def test_a_library_that_does_not_load_leaves_the_cpu_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_ops_cuda.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_library, "find_spec", lambda name: ModuleSpec(name, None, origin=str(broken)))
    monkeypatch.setattr(_library, "FAILED", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(UserWarning, match=r"no operators for CUDA tensors: .*_ops_cuda.so does not load into torch"):
        _library._load("_ops_cuda", required=False)
    assert "_ops_cuda" in _library.FAILED
    assert "do not load" in collect()["cuda"]["operators"]
    with pytest.raises(ImportError, match="does not load"):
        _library._load("_ops_cuda", required=True)


@pytest.mark.skipif("_ops_cuda" in _library.LOADED, reason="the CUDA operators are loaded")
def test_without_the_library_an_operator_on_the_gpu_is_named() -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=r"kronfac::covariance.*'CUDA' backend"):
        torch.ops.kronfac.covariance.default.redispatch(keys, torch.ones(2, 2), False, 1.0)
