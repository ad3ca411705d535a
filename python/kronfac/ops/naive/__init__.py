"""Plain torch references of the operators, in the type of their inputs: what the tests compare with, in float64."""

from __future__ import annotations

from kronfac.ops.naive.conv_covariance import conv_covariance, conv_covariance_
from kronfac.ops.naive.covariance import covariance, covariance_
from kronfac.ops.naive.damped_eigh import damped_eigh
from kronfac.ops.naive.damped_inverse import damped_inverse
from kronfac.ops.naive.eigen_precondition import eigen_precondition
from kronfac.ops.naive.kron_precondition import kron_precondition
from kronfac.ops.naive.orthogonalize import orthogonalize_
from kronfac.ops.naive.second_moment import second_moment_

__all__ = [
    "conv_covariance",
    "conv_covariance_",
    "covariance",
    "covariance_",
    "damped_eigh",
    "damped_inverse",
    "eigen_precondition",
    "kron_precondition",
    "orthogonalize_",
    "second_moment_",
]
