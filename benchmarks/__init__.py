"""Benchmarks: ``python -m benchmarks.NAME --json FILE``. Each writes the rows of ``benchmarks.report``."""
