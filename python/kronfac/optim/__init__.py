"""Optimizers that use curvature."""

from __future__ import annotations

from kronfac.optim.kfac import KFAC as KFAC
from kronfac.optim.memory import LayerMemory as LayerMemory
from kronfac.optim.memory import MemoryReport as MemoryReport
from kronfac.optim.memory import predict_memory as predict_memory
from kronfac.optim.monitor import Monitor as Monitor
