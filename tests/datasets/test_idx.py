from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kronfac.datasets import DatasetError
from kronfac.datasets.idx import read_idx
from tests.datasets.files import idx_bytes


def one_line(error: pytest.ExceptionInfo[DatasetError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)), st.booleans())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, zipped: bool) -> None:
    path = tmp_path_factory.mktemp("idx") / "values"
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    assert np.array_equal(read_idx(path, array.ndim), array)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("lost", [1, 37, 119, 125, 134])
def test_truncated(tmp_path: Path, lost: int, zipped: bool) -> None:
    array = np.arange(120, dtype=np.uint8).reshape(4, 5, 6)
    content = idx_bytes(array)[: 16 + 120 - lost]
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DatasetError, match=re.escape(str(path)) + ".*(truncated|not an IDX)") as error:
        read_idx(path, 3)
    one_line(error)


@pytest.mark.parametrize("kept", [3, 11, 30, -9, -1])
def test_truncated_gzip_stream(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "values.gz"
    content = gzip.compress(idx_bytes(np.random.RandomState(0).randint(0, 256, (10, 20)).astype(np.uint8)))
    path.write_bytes(content[:kept])
    with pytest.raises(DatasetError, match="truncated or damaged gzip") as error:
        read_idx(path, 2)
    one_line(error)


def test_flipped_bit_in_gzip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "values.gz"
    content = bytearray(gzip.compress(idx_bytes(np.random.RandomState(0).randint(0, 256, (10, 20)).astype(np.uint8))))
    content[60] ^= 4
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="gzip"):
        read_idx(path, 2)


def test_too_long(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(np.zeros((3, 3), np.uint8)) + b"\0")
    with pytest.raises(DatasetError, match="longer than its header says"):
        read_idx(path, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PNG and so on", "not an IDX file"),
        (struct.pack(">BBBBI", 0, 0, 13, 2, 1) + b"\0" * 8, "type 0x0d"),
        (struct.pack(">BBBBI", 0, 0, 8, 1, 2) + b"ab", "expected 2 dimensions.*got 1"),
    ],
)
def test_not_what_was_expected(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "values"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        read_idx(path, 2)
    one_line(error)


def test_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**10, 2**10) + b"abc")
    with pytest.raises(DatasetError, match=r"truncated.*got 3"):
        read_idx(path, 3)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        read_idx(tmp_path / "absent", 3)
