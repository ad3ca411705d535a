"""Optimizers that use curvature."""

from __future__ import annotations

from kronfac.optim.kfac import KFAC as KFAC
