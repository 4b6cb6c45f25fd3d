"""The paper's tables and figures at a size that two CPU cores manage: what `ctf reproduce` does."""
