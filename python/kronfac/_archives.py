"""Reading what `torch.save` has written."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


class DamagedError(Exception):
    """A file that is no whole archive; the message says what is wrong with it."""


def load_archive(path: Path) -> Any:
    """Load tensors and plain values to the CPU, after checking the archive; nothing in it is executed.

    Raises:
        OSError: the file cannot be read.
        pickle.UnpicklingError: it is no checkpoint, or holds more than tensors and plain values.
        DamagedError: it is damaged.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums that torch.save writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise DamagedError(f"checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign files before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except (DamagedError, OSError, pickle.UnpicklingError):
        raise
    except Exception as error:  # a damaged archive may raise nearly anything
        raise DamagedError(str(error) or type(error).__name__) from error
