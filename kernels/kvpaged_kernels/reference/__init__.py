"""Eager oracles: what each kernel has to compute, written to be read. Optimised code never imports them."""
