"""Benchmarks; the scripts here run by themselves, and ``python -m bench.gpu`` is ``make gpu``."""
