"""Benchmarks: speed compared with what each part replaces, and quality by minutes of training."""
