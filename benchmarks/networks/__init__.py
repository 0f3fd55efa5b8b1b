"""Networks of other packages: which become programs, and why others do not: ``python -m benchmarks.networks``."""
