"""The serving benchmark, run by `kvpaged bench`, and what all benchmarks share."""
