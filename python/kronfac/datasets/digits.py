"""scikit-learn's digits: 1797 images of 8 × 8 pixels, embedded in that package."""

from __future__ import annotations

import numpy as np

from kronfac.datasets.dataset import Dataset, DatasetError, standardised

TEST_EXAMPLES = 360
_SPLIT_SEED = 1797


def load_digits() -> Dataset:
    """Return the digits, 1437 for training and 360 for testing.

    The split is fixed: it comes from numpy's legacy generator, whose stream numpy guarantees not to change. It is a
    random one because the file is ordered by writer; the last fifth would test on unseen writers.

    Raises:
        DatasetError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_embedded
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "sklearn":
            raise
        raise DatasetError("digits: scikit-learn is not installed; run `pip install 'kronfac[demo]'`") from None
    images, labels = load_embedded(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.uint8)  # values 0..16, exact
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
    test, train = order[:TEST_EXAMPLES], order[TEST_EXAMPLES:]
    return standardised("digits", (images[train], labels[train]), (images[test], labels[test]), classes=10)
