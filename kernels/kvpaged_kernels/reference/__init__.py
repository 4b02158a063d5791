"""Eager oracles: what each kernel has to compute. Optimised code never imports them."""
