"""Training: every stage from images to a pipeline, resumable to the bit, and what it costs."""
