"""What README.md, docs/*.md, exercises/*.md and the docstrings name is there: commands and their
flags, files, functions, tests, links; the numbers of lines are true.

A complaint says where and what; each kind is shown to be found in a planted document."""

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from checks import equal, expect
from torch.distributed.run import get_args_parser as torchrun_parser

import contrastive
import data
import evaluate
import model
import pretrain
from plumbing import formats, ranks
from plumbing.errors import InputError
from plumbing.images import Images

ROOT = Path(__file__).parent.parent
ROOMS = ("plumbing", "toy", "tools", "exercises", "tests", "docs")
FIVE = ("data.py", "model.py", "pretrain.py", "contrastive.py", "evaluate.py")
STUDENTS = ("my_exercises.py", "my.py", "other.py")  # files that a class writes
PLACEHOLDER = re.compile(r"…|\.\.\.|[$<>{}\[\]]")


class Document(NamedTuple):
    """A text that names things; path: below the root."""

    path: str
    text: str


def markdown():
    """All documents."""
    paths = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("exercises/*.md")]
    return [Document(str(p.relative_to(ROOT)), p.read_text()) for p in sorted(paths)]


def python_files():
    """The five files and the rooms'."""
    paths = [ROOT / name for name in FIVE]
    for room in ROOMS:
        paths += sorted((ROOT / room).rglob("*.py"))
    return paths


@cache
def docstrings():
    """The first words of each file, as documents: their indented lines are commands."""
    documents = []
    for path in python_files():
        text = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
        lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
        block = [re.split(r"\s{2,}", line.strip())[0] for line in lines if line[:4] == "    "]
        fenced = "```bash\n" + "\n".join(block) + "\n```\n"
        documents.append(Document(str(path.relative_to(ROOT)), fenced))
    return documents


# ------------------------------------------------------------------------------- reading a document


def blocks(document, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.text, re.DOTALL | re.MULTILINE)


def spans(document):
    """What stands in `single quotes` outside of blocks."""
    text = re.sub(r"^```.*?^```", "", document.text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def tables(document):
    """Yields (names of the columns, rows) of each table; a row: the text of its cells."""
    for table in re.findall(r"(?:^\|.*\n)+", document.text + "\n", re.MULTILINE):
        rows = []
        for line in table.splitlines():
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            rows.append([cell.strip() for cell in cells])
        yield rows[0], rows[2:]


class Command(NamedTuple):
    """A command line. target: a file (`pretrain.py`) or a module (`tools.look`); words: what comes
    behind it; launcher: the words of torchrun; comment: what stands behind a #."""

    where: str
    target: str
    words: list
    launcher: list
    comment: str


def read_command(where, line, comment=""):
    """-> Command, or None for what is no Python program."""
    with contextlib.suppress(ValueError):  # of shlex: a quote that is not closed
        words = shlex.split(line)
        while words and re.fullmatch(r"\w+=\S*", words[0]):  # OMP_NUM_THREADS=1
            words.pop(0)
        program, launcher = words[0] if words else "", []
        if program == "pytest" or (program.endswith(".py") and len(words) > 1):
            return Command(where, program, words[1:], launcher, comment)
        if program not in ("python", "torchrun"):
            return None
        for i, word in enumerate(words):
            if i and (word == "-m" or word.endswith(".py")):
                at = i + (word == "-m")
                launcher = words[1:i] if program == "torchrun" else []
                return Command(where, words[at], words[at + 1 :], launcher, comment)
        if program == "torchrun":
            return Command(where, "", [], words[1:], comment)
    return None


def commands(documents):
    """Every command line of blocks of bash, and of spans."""
    lines = []
    for document in documents:
        for block in blocks(document, "bash"):
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
                line, _, comment = line.partition(" #")
                for part in re.split(r"&&|;|\||\bdo\b", line):
                    lines.append(read_command(document.path, part.strip(), comment))
        lines += [read_command(document.path, span) for span in spans(document)]
    return [command for command in lines if command]


# --------------------------------------------------------------------------------- what there is


def file_of(target):
    """The file of a command of ours, or None."""
    if not target.endswith(".py"):
        target = target.replace(".", "/") + ".py"
    path = ROOT / target
    return path if path.is_file() else None


def has_parser(path):
    """Whether a script reads flags; one that does not (toy/make.py, those of the tests) must not be
    run to ask it."""
    source = path.read_text()
    of_tests = path.parent == ROOT / "tests" and path.stem != "mutate"
    is_script = not of_tests and '\nif __name__ == "__main__":' in source
    return is_script and re.search(r"parse_args\(|ranks\.run\(|\.parse\(", source) is not None


class Parsed(Exception):
    """Raised in the place of all that a script would do after reading its flags."""


def parse(path, words):
    """Runs a script until its flags are read. -> (its parser, what it says if it refuses them)."""
    parsers, said = [], io.StringIO()
    parse_args = argparse.ArgumentParser.parse_args

    def read(self, args=None, namespace=None):
        parsers.append(self)
        parse_args(self, args, namespace)
        raise Parsed

    def leave(message):
        raise SystemExit(message)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", read))
        stack.enter_context(mock.patch.object(ranks, "leave", leave))
        stack.enter_context(mock.patch.object(sys, "argv", [str(path), *words]))
        if not (path.parent / "__init__.py").exists():  # as `python FILE` has it, and -m has not
            stack.enter_context(mock.patch.object(sys, "path", [str(path.parent), *sys.path]))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(said))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsed:
            return parsers[-1], ""
        except SystemExit as e:
            lines = said.getvalue().splitlines() or [str(e.code)]
            return parsers[-1] if parsers else None, lines[-1]
    raise AssertionError(f"{path} reads no flags")


@cache
def options_of(path):
    """{flag: its help} of a script."""
    if not has_parser(path):
        return {}
    parser, _ = parse(path, ["--help"])
    return {flag: action.help for flag, action in parser._option_string_actions.items()}


@cache
def torchrun_options():
    """torchrun's flags; it takes them with - and with _. README names one that older ones lack."""
    return {*torchrun_parser()._option_string_actions, "--shutdown-timeout"}


def scripts():
    """All files with a command line of flags."""
    return [path for path in python_files() if has_parser(path)]


@cache
def names_of(path):
    """Functions, classes, constants and `Class.method`s that a file defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            methods = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            names |= {f"{node.name}.{x.name}" for x in methods}
    return names


@cache
def all_tests():
    """The names of all tests."""
    paths = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "exercises").glob("test_*.py")]
    return {name for path in paths for name in names_of(path) if name.startswith("test_")}


# ------------------------------------------------------------------------------- what is complained


def flags_in(text):
    """--flag and -f words of a text."""
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", text)


def is_program(target):
    """Whether `python target` or `python -m target` runs: ours, a student's, or a library's."""
    if file_of(target) or target in STUDENTS or "NAME" in target:
        return True
    top = target.split(".")[0]
    library = top not in ROOMS and not target.endswith(".py")
    return library and importlib.util.find_spec(top) is not None


def missing_commands(documents):
    """Programs that are not there, and files that pip or pytest shall read."""
    complaints = []
    for c in commands(documents):
        where = f"{c.where}: {c.target} {' '.join(c.words)}"
        if c.target and not is_program(c.target):
            complaints.append(f"{where}: no such program")
        for word in c.words:
            named = c.target == "pip" and word.endswith(".txt")
            named = named or (c.target == "pytest" and word.split("/")[0] in ROOMS)
            if named and not (ROOT / word.split("::")[0]).exists():
                complaints.append(f"{where}: no {word}")
    return complaints


def missing_flags(documents):
    """Flags that the command of the line does not have, values that it does not take, marks that
    pytest does not know."""
    complaints, marks = [], (ROOT / "pyproject.toml").read_text()
    for c in commands(documents):
        where = f"{c.where}: {c.target} {' '.join(c.words)}"
        path = file_of(c.target)
        for flag in flags_in(" ".join(c.launcher)):
            if flag not in torchrun_options():
                complaints.append(f"{where}: torchrun has no {flag}")
        if c.target in ("pytest", "exercises.bugs"):  # the rest is pytest's
            for mark in re.findall(r"-m (\w+)", " ".join(c.words)):
                if f'"{mark}: ' not in marks:
                    complaints.append(f"{where}: pytest knows no mark {mark}")
        elif path:
            words = " ".join(c.words)
            unknown = [f for f in flags_in(f"{words} {c.comment}") if f not in options_of(path)]
            complaints += [f"{where}: it has no {flag}" for flag in unknown]
            if "--" in words and not unknown and not PLACEHOLDER.search(words):
                _, refused = parse(path, c.words)
                complaints += [f"{where}: {refused}"] if refused else []
    return complaints


def stray_flags(documents):
    """Flags in `quotes` that no program has."""
    known = set(torchrun_options())
    for path in scripts():
        known |= set(options_of(path))
    complaints = []
    for document in documents:
        for span in spans(document):
            if span.startswith("--"):
                unknown = [flag for flag in flags_in(span) if flag not in known]
                complaints += [f"{document.path}: no program has {flag}" for flag in unknown]
    return complaints


def missing_names(documents):
    """`file.py: function`, and what the examples import."""
    complaints = []
    for document in documents:
        pairs = re.findall(r"`([\w/]+\.py): ([\w.]+)`", document.text)
        for block in blocks(document, "python"):
            for module, names in re.findall(r"^from ([\w.]+) import (.+)$", block, re.MULTILINE):
                if file_of(module):
                    pairs += [(file_of(module), name) for name in names.split(", ")]
        for file, name in pairs:
            path = ROOT / file
            if not path.is_file() or name not in names_of(path):
                complaints.append(f"{document.path}: {file} has no {name}")
    return complaints


def missing_files(documents):
    """Files that a `quoted path` names, by their path, or by their name alone."""
    everywhere = {path.name for path in python_files()}
    complaints = []
    for document in documents:
        for span in spans(document):
            in_a_room = span.split("/")[0] in ROOMS and "/" in span
            if not re.fullmatch(r"[a-z_][\w./*-]*", span):  # FOLDER/*.py is anybody's
                continue
            if not in_a_room and not span.endswith(".py"):
                continue
            if not list(ROOT.glob(span)) and span not in everywhere and span not in STUDENTS:
                complaints.append(f"{document.path}: no file {span}")
    return complaints


def missing_tests(documents):
    """`test_x.py`, a test's name, or its beginning and …"""
    complaints, files = [], {path.name for path in python_files()}
    for document in documents:
        for name in re.findall(r"\b(test_[\w]*(?:\.py|…)?)", "\n".join(spans(document))):
            if name.endswith("…"):
                known = any(test.startswith(name[:-1]) for test in all_tests())
            else:
                known = name in files or name in all_tests()
            if not known:
                complaints.append(f"{document.path}: no test {name}")
    return complaints


def unproven(documents):
    """Rows of a table with a column "proof" or "test" that name none, or have an empty cell."""
    complaints, rows_seen = [], 0
    for document in documents:
        for header, rows in tables(document):
            columns = [i for i, name in enumerate(header) if name in ("proof", "test")]
            for row in rows if columns else []:
                rows_seen += 1
                named = re.search(r"`(tests/)?test_\w+(\.py|…)?", row[columns[0]])
                if not named or not all(row):
                    complaints.append(f"{document.path}: {' | '.join(row)}: no test")
                if header[0] == "paper" and not re.match("CoMa|VLM2Vec", row[0]):
                    complaints.append(f"{document.path}: {row[0]}: of which paper?")
    if rows_seen < 24:
        complaints.append(f"{rows_seen} rows of tables with a column `proof` or `test`, 24 wanted")
    return complaints


def wrong_lines(documents):
    """A column "lines" beside the name of a file; each of the five must have its number."""
    complaints, seen = [], set()
    for document in documents:
        for header, rows in tables(document):
            if "lines" not in header:
                continue
            for row in rows:
                name, number = row[0].strip("`"), row[header.index("lines")]
                if file_of(name) and number.isdigit():
                    seen.add(name)
                    have = len(file_of(name).read_text().splitlines())
                    if have != int(number):
                        complaints.append(f"{document.path}: {name} has {have} lines, not {number}")
    complaints += [f"README.md: how many lines has {name}?" for name in FIVE if name not in seen]
    return complaints


def anchors(text):
    """What the headings of a document can be linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def dead_links(documents):
    """Links and pictures inside the repository."""
    complaints = []
    for document in documents:
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", document.text):
            target = "".join(target)
            if re.match(r"https?:|mailto:", target):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / document.path).parent / file if file else ROOT / document.path
            text = document.text
            if file:
                text = path.read_text() if path.suffix == ".md" and path.exists() else ""
            if not path.exists() or (anchor and anchor not in anchors(text)):
                complaints.append(f"{document.path}: nothing at {target}")
    return complaints


def unread_lines(documents):
    """Lines of JSON that are shown as data, and that no reader of ours takes."""
    complaints, images = [], Images(ROOT)
    readers = (formats.parse_dialogue, formats.parse_pair, formats.parse_caption)
    for document in documents:
        for line in "".join(blocks(document, "json")).splitlines():
            refusals = []
            for reader in readers:
                try:
                    reader(json.loads(line), images)
                except (InputError, ValueError) as e:
                    refusals.append(str(e))
            if len(refusals) != len(readers) - 1:
                complaints.append(f"{document.path}: {line}: {refusals}")
    return complaints


# ---------------------------------------------------------------------------------------- the tests

CHECKS = (
    missing_commands,
    missing_flags,
    stray_flags,
    missing_names,
    missing_files,
    missing_tests,
    unproven,
    wrong_lines,
    dead_links,
    unread_lines,
)


@pytest.mark.parametrize("check", CHECKS)
def test_what_the_documents_name_is_there(check):
    """README.md, docs/*.md, exercises/*.md."""
    equal(check(markdown()), [], check.__doc__)


@pytest.mark.parametrize("check", [missing_commands, missing_flags])
def test_the_commands_in_docstrings_are_there(check):
    """Of every file: the indented lines of its first docstring."""
    expect(len(commands(docstrings())) > 40, commands(docstrings()), "> 40", "their form")
    equal(check(docstrings()), [], check.__doc__)


def test_the_commands_in_messages_are_there():
    """`python X` in any string of the code: an error's way out must be one."""
    seen = 0
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            if path.parent == ROOT / "tests":  # planted documents, other names
                continue
            for target in re.findall(r"\bpython (?:-m )?([\w/.]+)", node.value):
                at_home = target.endswith(".py") or target.split(".")[0] in ROOMS
                if at_home and "NAME" not in target and target[-1] != ".":
                    seen += 1
                    expect(file_of(target), f"{path.name}: python {target}", "a file", "moved?")
    expect(seen > 40, seen, "> 40", "the form of the commands in strings")


def test_every_flag_is_explained():
    """Each flag of each script is named in a document, or `--help` says what it does."""
    text = "\n".join(document.text for document in markdown())
    for path in scripts():
        for flag, explanation in options_of(path).items():
            shown = explanation and explanation != argparse.SUPPRESS
            hidden = path.parent.name == "bench"  # run by hand, by who reads it
            ok = shown or hidden or flag in flags_in(text) or not flag.startswith("--")
            expect(ok, f"{path.name} {flag}", "a word in --help, README or docs", "config.flag")


def test_the_names_that_users_rely_on_are_there():
    """The functions and classes of the five files, each with a docstring."""
    for module, names in (
        (model, "Embedder load save merge last_token_pool compression_pool"),
        (data, "Item Dialogue Pair Task Collator read_dialogues read_pairs read_tasks"),
        (pretrain, "compression_mask answer_labels answer_loss"),
        (contrastive, "paper_info_nce info_nce two_passes gradcache_step"),
        (evaluate, "precision_at_1"),
    ):
        for name in names.split():
            assert getattr(module, name).__doc__, f"{module.__name__}.{name} says nothing"


FAULTS = [  # (check, a document with one thing wrong, part of the complaint)
    (missing_commands, "```bash\npython pretrian.py --steps 3\n```", "pretrian.py --steps 3: no"),
    (missing_commands, "`python -m tools.serch --images DIR`", "tools.serch --images DIR: no such"),
    (missing_commands, "`python -m pip install -r tests/needs.txt`", "no tests/needs.txt"),
    (missing_commands, "`python -m pytest -q tests/test_nothing.py`", "no tests/test_nothing.py"),
    (missing_flags, "```bash\ntorchrun contrastive.py --batches 3\n```", "it has no --batches"),
    (missing_flags, "```bash\npython evaluate.py \\\n  --image DIR\n```", "it has no --image"),
    (missing_flags, "```bash\npython pretrain.py --pooling max\n```", "invalid choice: 'max'"),
    (missing_flags, "```bash\nA=1 python pretrain.py  # or --lorarank 3\n```", "no --lorarank"),
    (missing_flags, "`evaluate.py --search`", "it has no --search"),
    (missing_flags, "`python -m tools.merge IN OUT --export onnx`", "invalid choice: 'onnx'"),
    (missing_flags, "`torchrun --nproc-per-gpu 8 pretrain.py`", "torchrun has no --nproc-per-gpu"),
    (missing_flags, "`python -m toy.make DIR --seed 3`", "it has no --seed"),
    (missing_flags, "`pytest -m ex99`", "no mark ex99"),
    (stray_flags, "lower `--chunk-size 3`", "no program has --chunk-size"),
    (missing_names, "`model.py: Embedder.decode`", "model.py has no Embedder.decode"),
    (missing_names, "```python\nfrom model import loads\n```", "has no loads"),
    (missing_files, "see `plumbing/rank.py`", "no file plumbing/rank.py"),
    (missing_files, "see `shapes.py`", "no file shapes.py"),
    (missing_files, "see `docs/no/`", "no file docs/no/"),
    (missing_tests, "see `test_shapes.py`", "no test test_shapes.py"),
    (missing_tests, "see `test_killed_by_accident_…`", "no test test_killed_by_accident_…"),
    (unproven, "| promise | test |\n|---|---|\n| fast | `x.py` |\n", "fast | `x.py`: no test"),
    (wrong_lines, "| file | lines |\n|---|---|\n| `model.py` | 9 |\n", "lines, not 9"),
    (wrong_lines, "", "how many lines has evaluate.py?"),
    (dead_links, "[x](docs/nothing.md)", "nothing at docs/nothing.md"),
    (dead_links, "# A, B: c\n[x](#a-b-c) [y](#a-b)", "nothing at #a-b"),
    (dead_links, "[x](README.md#no-such-heading)", "nothing at README.md#no-such-heading"),
    (unread_lines, '```json\n{"file": "a.png", "text": "a dog"}\n```', "a dog"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0].__name__} {fault[2]}")
def test_each_fault_is_found(fault):
    """Negative control: a document with one thing wrong."""
    check, text, says = fault
    complaints = check([Document("README.md", text)])
    expect(any(says in c for c in complaints), complaints, says, check.__doc__)
