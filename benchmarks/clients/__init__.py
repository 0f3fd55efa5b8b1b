"""Traces the samplers of other packages and compares each with itself: docs/benchmarks/loops.md."""
