"""Schedules of batch size and learning rate: fixed, linear scaling, growing, and adapted to the Hessian's spectrum."""

from __future__ import annotations

from kronfac.schedules.adaptive import AdaptiveBatch as AdaptiveBatch
from kronfac.schedules.base import BatchSchedule as BatchSchedule
from kronfac.schedules.eigenvalue import TopEigenvalue as TopEigenvalue
from kronfac.schedules.eigenvalue import top_eigenvalue as top_eigenvalue
from kronfac.schedules.fixed import FixedBatch as FixedBatch
from kronfac.schedules.fixed import GrowBatch as GrowBatch
from kronfac.schedules.fixed import LinearScaling as LinearScaling
from kronfac.schedules.parts import Part as Part
from kronfac.schedules.parts import Step as Step
