"""`python -m embervlm`, where the installed command is not on the path."""

from embervlm.cli import program

if __name__ == "__main__":
    program()
