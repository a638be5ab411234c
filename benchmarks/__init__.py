"""Measurements, run from the repository's root: ``python -m benchmarks.side_by_side --help``."""
