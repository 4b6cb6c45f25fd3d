"""How good samples are: features, metrics, reference sets and reports."""
