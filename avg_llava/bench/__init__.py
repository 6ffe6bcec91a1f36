"""Benchmarks of training, inference, data loading and serving on this machine, each against a reference.

Every module runs its benchmark with one function (`bench_train`, `bench_inference`, `bench_data`, `bench_serve`) that
returns a JSON-serialisable dictionary, and formats that dictionary with `table_lines`.
"""
