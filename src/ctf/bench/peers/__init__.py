"""Other libraries that `ctf bench fit` compares with; each trains as its users would."""
