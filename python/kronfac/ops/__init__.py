"""The compiled operators as typed functions; the naive reference of each lies in `kronfac.ops.naive`."""

from __future__ import annotations

from kronfac.ops.conv_covariance import conv_covariance, conv_covariance_
from kronfac.ops.covariance import covariance, covariance_
from kronfac.ops.damped_eigh import damped_eigh
from kronfac.ops.damped_inverse import damped_inverse
from kronfac.ops.eigen_precondition import eigen_precondition
from kronfac.ops.kron_precondition import kron_precondition
from kronfac.ops.orthogonalize import orthogonalize_
from kronfac.ops.second_moment import second_moment_

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
