from __future__ import annotations

import sys

import pytest
import torch

from kronfac.datasets import DatasetError, load


def test_split_is_fixed_and_disjoint() -> None:
    data = load("digits")
    assert (len(data.train), len(data.test), data.input_shape, data.classes) == (1437, 360, (1, 8, 8), 10)
    # Recorded once; another split would make figures of different days incomparable.
    assert data.test.targets[:12].tolist() == FIRST_TEST_TARGETS
    assert torch.bincount(data.test.targets, minlength=10).min() >= 25
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    raw = torch.cat([data.train.inputs, data.test.inputs]).double() * data.std[0] + data.mean[0]
    rows = torch.cat([raw.view(-1, 64), torch.cat([data.train.targets, data.test.targets])[:, None]], dim=1).round()
    expected = torch.cat([torch.from_numpy(images), torch.from_numpy(labels)[:, None]], dim=1)
    # Every image is in exactly one split.
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_standardised() -> None:
    inputs = load("digits").train.inputs.double()
    assert abs(inputs.mean()) < 1e-6
    assert abs(inputs.std(correction=0) - 1) < 1e-6


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'kronfac\[demo\]'"):
        load("digits")


FIRST_TEST_TARGETS = [5, 0, 0, 0, 1, 3, 6, 5, 6, 6, 3, 6]
