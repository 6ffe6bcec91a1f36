"""Benchmarks of training, inference, data loading and serving, each against a plain reference."""
