"""`python -m ctf` is the command `ctf`."""

from ctf.cli.main import program

program()
