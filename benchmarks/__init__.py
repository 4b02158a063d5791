"""Benchmarks: `python -m benchmarks.<name>`; each ends with one JSON document on stdout."""
