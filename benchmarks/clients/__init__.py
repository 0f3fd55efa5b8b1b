"""Other samplers, each traced and compared with itself: ``python -m benchmarks.clients --out docs/benchmarks/loops.md``."""
