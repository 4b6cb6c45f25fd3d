"""Benchmarks of sampling, training and reading, each measured beside what it replaces."""
