from ctf.cli import program

program()
