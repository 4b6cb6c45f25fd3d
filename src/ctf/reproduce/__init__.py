"""The paper's tables and figures at a size for two CPU cores: `ctf reproduce`."""
