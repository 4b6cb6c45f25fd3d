"""Benchmarks of sampling, training and data reading, each compared with what it replaces."""
