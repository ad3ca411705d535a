"""The CUDA operators as a library: loaded only with a torch that has CUDA, and clear about what is missing."""

from __future__ import annotations

import shutil
import subprocess
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


def test_code_for_both_architectures_and_later_ones() -> None:
    spec, tool = find_spec("kronfac._ops_cuda"), shutil.which("cuobjdump")
    if spec is None or spec.origin is None or tool is None:
        pytest.skip("no CUDA operators in this build, or no cuobjdump")
    listed = subprocess.run([tool, "--list-elf", "--list-ptx", spec.origin], capture_output=True, text=True, check=True)
    for code in ("sm_80.cubin", "sm_90.cubin", "sm_90.ptx"):
        assert code in listed.stdout


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
