"""Groups of benchmark cases; each is measured by a process of its own (`bench.gpu_check.measure`)."""

from __future__ import annotations

GROUPS: tuple[str, ...] = (
    "covariance",
    "conv_covariance",
    "damped_inverse",
    "damped_eigh",
    "kron_precondition",
    "eigen_precondition",
    "second_moment_",
    "orthogonalize_",
    "steps",
)
