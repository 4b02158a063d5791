"""Triton kernels with their launchers. Importing a module of this package imports Triton."""
