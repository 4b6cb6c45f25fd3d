"""Training of every stage, one by one or all by `fit`."""
