"""The command line: `kronfac demo | train | spectrum | bench | info`."""

from __future__ import annotations

from kronfac.cli.user_problem import UserProblem as UserProblem
