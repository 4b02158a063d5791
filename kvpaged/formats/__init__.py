"""Formats of K and V inside pages."""
