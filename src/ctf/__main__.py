from ctf.cli.main import program

program()
