"""What the commands share: a parser whose help is the file's docstring."""

import argparse


def make_parser(name, docstring) -> argparse.ArgumentParser:
    """`python -m tools.NAME --help` shows the docstring as it stands; no short flags."""
    return argparse.ArgumentParser(
        f"python -m tools.{name}",
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
