"""`kronfac bench`: the operators and whole training steps against their rivals, both sides in one run."""
