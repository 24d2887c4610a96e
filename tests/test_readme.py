"""The README names functions, tests, flags and files: they exist. Its numbers of lines are true."""

import ast
import re
from pathlib import Path

import contrastive
import data
import evaluate
import model
import pretrain
import tools

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTS = {p.name: p.read_text() for p in (ROOT / "tests").rglob("*.py")}


def section(title):
    """The text below a heading, up to the next one of its level or above."""
    level = re.search(rf"^(#+) {re.escape(title)}", README, re.MULTILINE)
    rest = README[level.end() :]
    end = re.search(rf"^#{{1,{len(level[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def names_of(source):
    """Functions, classes, methods and class attributes that a file defines."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


def test_read_along_names_what_is_there():
    """Each row of the table: paper | `file.py: function` | a test file | what differs."""
    rows = [r for r in section("Read along").splitlines() if r.startswith("| ")][1:]
    assert len(rows) >= 12
    for row in rows:
        paper, code, proof, differs = (x.strip() for x in row.strip("|").split("|"))
        assert re.match("CoMa|VLM2Vec", paper) and code and differs, row
        for file, name in re.findall(r"`(\w+\.py): ([\w.]+)`", code):
            assert name.split(".")[-1] in names_of((ROOT / file).read_text()), f"{file}: no {name}"
        for flag in re.findall(r"`--([\w-]+)`", code):
            assert hasattr(pretrain.Config(), flag.replace("-", "_")), f"no flag --{flag}"
        tests = re.findall(r"`tests/(\w+\.py)`", proof)
        assert tests and all(t in TESTS for t in tests), f"no such test: {row}"


def test_every_promise_names_a_test_that_is_there():
    """`test_x.py`, or the beginning of a test's name."""
    everything = set().union(*map(names_of, TESTS.values()))
    rows = [r for r in section("What we promise").splitlines() if r.startswith("| ")][1:]
    assert len(rows) >= 12
    for row in rows:
        tests = re.findall(r"`(test_\w+(?:\.py|…)?)", row.rsplit("|", 2)[1])
        assert tests, f"{row}\nnames no test"
        for test in tests:
            known = test in TESTS or any(n.startswith(test.rstrip("…")) for n in everything)
            assert known, f"{test}: no such test\n{row}"


def test_the_table_of_files_is_true():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\w+) \|", section("Files"), re.MULTILINE):
        have = len((ROOT / name).read_text().splitlines())
        assert lines == str(have), f"README: {name} has {lines} lines; it has {have}"


def test_every_command_has_only_flags_that_exist(monkeypatch):
    """All `python x.py ...` and `torchrun ... x.py ...` lines: parsed as their script would."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    blocks = re.sub(r"\\\n\s*", " ", blocks) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", README))
    stages = {"pretrain.py": pretrain, "contrastive.py": contrastive, "evaluate.py": evaluate}
    seen = 0
    for script, rest in re.findall(r"(\w+\.py)((?: +[^\n&|#]*)?)", blocks):
        words = re.findall(r'"[^"]*"|\S+', rest)
        if script in stages and not any("…" in w or "..." in w for w in words):
            stages[script].Config.parse([w.strip('"') for w in words])
            seen += len(words)
        elif script == "data.py" and words[:1] and words[0] in ("check", "generate"):
            done = []
            monkeypatch.setattr(tools, words[0], lambda *a, done=done: done.append(a) or 0)
            tools.data_commands(words)
            assert done
            seen += len(words)
    assert seen > 80


def test_the_names_that_users_rely_on_are_there():
    for module, names in (
        (model, "Embedder load save last_token_pool compression_pool"),
        (data, "Item Shapes read_dialogues read_pairs read_tasks Collator"),
        (pretrain, "compression_mask answer_loss"),
        (contrastive, "info_nce gradcache_step"),
        (evaluate, "precision_at_1"),
    ):
        for name in names.split():
            assert getattr(module, name).__doc__, f"{module.__name__}.{name} says nothing"
