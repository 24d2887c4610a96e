"""What commands share that take no numbers: a parser whose help is the file's docstring. (Commands
with numbers declare a `Config`, as the stages do.)"""

from plumbing.config import Parser


def make_parser(name, docstring) -> Parser:
    """`python -m tools.NAME --help` shows the docstring as it stands; no short flags."""
    return Parser(f"python -m tools.{name}", docstring)
