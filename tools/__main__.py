"""What the room says of itself where no command is named: the list of them, each with the first
lines of its docstring."""

import ast
import sys
from pathlib import Path


def first_paragraph(path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def commands() -> dict:
    """{name: what it does} of the files that can be run."""
    known = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        if "\n    run_command(main)" in text or "\n    ranks.run(main, Config)" in text:
            known[path.stem] = first_paragraph(path)
    return known


def listing() -> str:
    """A line for each command."""
    lines = ["Commands, `python -m tools.NAME --help` says more:", ""]
    lines += [f"    {name:<12} {text}" for name, text in commands().items()]
    return "\n".join(lines)


if set(sys.argv[1:]) <= {"--help", "-h"}:
    print(listing())
else:
    sys.exit(f"tools: no command in {' '.join(sys.argv[1:]):.100}\n{listing()}")
