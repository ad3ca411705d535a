"""Kronecker-factored curvature and Hessian spectra for PyTorch, with a compiled core."""

from __future__ import annotations

from importlib.metadata import version as _version

from kronfac import _library as _library  # registers torch.ops.kronfac

__version__ = _version("kronfac")
