"""Numerical primitives: segment sums, and the reference operator on densities."""
