"""Continuous batching over a paged cache: requests, their scheduling, sampling, and the loop."""
