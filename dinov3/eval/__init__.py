"""Evaluations: pure functions from arrays to numbers, and the scripts around them."""
