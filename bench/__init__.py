"""Benchmarks of a checkout; see README.md. Cases and measuring live in `kronfac.cli.bench`."""
