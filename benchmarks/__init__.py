"""Benchmarks of graphopt: each module runs as ``python -m benchmarks.<name>`` and needs no editing."""
