"""A trained pipeline: loaded, sampled from, edited with, saved and shared."""
