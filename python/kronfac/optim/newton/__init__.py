"""Newton-type optimizers: they evaluate a closure on samples of the data and multiply with its curvature."""

from __future__ import annotations

from kronfac.optim.newton.base import NewtonOptimizer as NewtonOptimizer
from kronfac.optim.newton.base import NewtonStep as NewtonStep
from kronfac.optim.newton.cubic import CubicAttempt as CubicAttempt
from kronfac.optim.newton.cubic import CubicNewton as CubicNewton
from kronfac.optim.newton.cubic import CubicStep as CubicStep
from kronfac.optim.newton.gauss_newton import GaussNewtonCG as GaussNewtonCG
from kronfac.optim.newton.gauss_newton import GaussNewtonStep as GaussNewtonStep
from kronfac.optim.newton.newton_minres import NewtonMINRES as NewtonMINRES
from kronfac.optim.newton.newton_minres import NewtonMINRESStep as NewtonMINRESStep
from kronfac.optim.newton.trcg import TRCG as TRCG
from kronfac.optim.newton.trcg import TrustRegionAttempt as TrustRegionAttempt
from kronfac.optim.newton.trcg import TrustRegionStep as TrustRegionStep
