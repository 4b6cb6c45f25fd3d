"""The mathematics of `ctf.models`, computed faster: modules that replace those of a plain model."""
