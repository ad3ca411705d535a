"""The emulation itself: it sees races, and the sanitizers see what is out of bounds."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.cuda import emulation
from tests.cuda.orders import in_every_order


def _neighbours(out: Tensor, racing: bool) -> Tensor:
    emulation.library("emulate_orders.cpp").emulate_neighbours(ctypes.c_bool(racing), emulation.pointer(out))
    return out


def test_a_race_depends_on_the_order() -> None:
    results = []
    for order in emulation.ORDERS:
        with emulation.threads_in(order):
            results.append(_neighbours(torch.zeros(64, dtype=torch.int32), True).tolist())
    assert results[0] == [-1] * 63 + [0]  # nobody has written yet but thread 0, when the last one reads
    assert results[1] == [*range(1, 64), -1]
    assert results[2] not in results[:2]
    with pytest.raises(AssertionError, match="depends on the order of threads"):
        in_every_order(_neighbours)(torch.zeros(64, dtype=torch.int32), True)


def test_a_phase_sees_all_of_the_phase_before_it() -> None:
    out = in_every_order(_neighbours)(torch.zeros(64, dtype=torch.int32), False)
    assert out.tolist() == [*range(1, 64), 0]


def test_every_emulation_is_checked() -> None:
    assert hasattr(emulation.second_moment_, "__wrapped__")


@pytest.mark.skipif(not os.environ.get("KRONFAC_SANITIZE"), reason="`make sanitize`")
@pytest.mark.parametrize(("size", "seen"), [(16, False), (12, True)])
def test_out_of_bounds_is_seen(size: int, seen: bool) -> None:
    call = (
        "import ctypes; from tests.cuda.emulation import library\n"
        f"library('emulate_orders.cpp').emulate_store(ctypes.c_int64({size}))"
    )
    result = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert ("heap-buffer-overflow" in result.stderr) == seen
    assert (result.returncode != 0) == seen
