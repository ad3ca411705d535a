"""Linear algebra above the compiled operators: damped inverses and eigenbases, Krylov methods, probes."""

from __future__ import annotations

from kronfac.linalg.cubic import CubicResult as CubicResult
from kronfac.linalg.cubic import cubic_regularised as cubic_regularised
from kronfac.linalg.damped import Eigenbases as Eigenbases
from kronfac.linalg.damped import Inverses as Inverses
from kronfac.linalg.damped import damped_inverses as damped_inverses
from kronfac.linalg.damped import eigenbases as eigenbases
from kronfac.linalg.damped import factored_damping as factored_damping
from kronfac.linalg.lanczos import KrylovSubspace as KrylovSubspace
from kronfac.linalg.lanczos import Quadrature as Quadrature
from kronfac.linalg.lanczos import lanczos_quadratures as lanczos_quadratures
from kronfac.linalg.lsmr import LeastSquaresResult as LeastSquaresResult
from kronfac.linalg.lsmr import lsmr as lsmr
from kronfac.linalg.minres import minres as minres
from kronfac.linalg.newton_minres import NewtonMinresResult as NewtonMinresResult
from kronfac.linalg.newton_minres import newton_minres as newton_minres
from kronfac.linalg.probes import draw_probes as draw_probes
from kronfac.linalg.probes import make_generator as make_generator
from kronfac.linalg.rectangular import MatrixFree as MatrixFree
from kronfac.linalg.solve import SolveResult as SolveResult
from kronfac.linalg.solve import cg as cg
from kronfac.linalg.solve import cg_shifts as cg_shifts
from kronfac.linalg.symmetric import CheckedOperator as CheckedOperator
from kronfac.linalg.symmetric import SymmetricOperator as SymmetricOperator
from kronfac.linalg.symmetric import check_operator as check_operator
from kronfac.linalg.trust_region import TrustRegionResult as TrustRegionResult
from kronfac.linalg.trust_region import trust_region_cg as trust_region_cg
