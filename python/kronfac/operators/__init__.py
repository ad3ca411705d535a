"""Curvature matrices of a loss as linear operators over the parameters of a model."""

from __future__ import annotations

from kronfac.operators.algebra import ParameterOperator as ParameterOperator
from kronfac.operators.algebra import identity as identity
from kronfac.operators.base import CurvatureOperator as CurvatureOperator
from kronfac.operators.closure import ClosureOperator as ClosureOperator
from kronfac.operators.fisher import fisher as fisher
from kronfac.operators.ggn import ggn as ggn
from kronfac.operators.hessian import hessian as hessian
from kronfac.operators.kfac import ekfac as ekfac
from kronfac.operators.kfac import kfac as kfac
from kronfac.operators.kronecker import KroneckerOperator as KroneckerOperator
