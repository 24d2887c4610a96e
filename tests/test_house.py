"""The house: imports run one way, the five files stay short and plain, the two passes stand once.

A complaint says file, line and rule; each kind is shown to be found in a planted tree of files."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from checks import equal, expect

ROOT = Path(__file__).parent.parent
STAGES = ("pretrain", "contrastive", "evaluate")
LIMITS = {"data": 320, "model": 260, "pretrain": 240, "contrastive": 320, "evaluate": 170}
ALL_LINES = 1250  # of the five together
FUNCTION, MAIN, ARGUMENTS = 40, 60, 6  # lines without the docstring, those of a `main`, arguments
EXPRESSIONS, COMMENTS = 6.0, 15  # a line of code, at most; for 100 lines of code, at least
ROOMS = ("plumbing", "toy", "tools", "exercises", "tests")
# Whom each may import, of ours; `tools`, `exercises` and `tests` may import all that follows.
BELOW = {
    "plumbing": ("plumbing",),
    "toy.world": (),
    "toy": ("toy", "data", "model", "plumbing"),
    "data": ("plumbing", "toy"),
    "model": ("data", "plumbing"),
    **dict.fromkeys(STAGES, ("data", "model", "plumbing")),
    "tools": ("tools", "toy", "data", "model", "plumbing", *STAGES),
    "exercises": (*ROOMS, *LIMITS),
    "tests": (*ROOMS, *LIMITS),
}
DYNAMIC = ("import_module", "__import__", "importlib", "runpy", "exec", "eval")


def read_tree(root):
    """{module: source} of the five files and the rooms."""
    paths = [root / f"{name}.py" for name in LIMITS]
    for room in ROOMS:
        paths += sorted((root / room).rglob("*.py"))
    sources = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text()
    return sources


@pytest.fixture(scope="module")
def house():
    """Our own files."""
    return read_tree(ROOT)


def room_of(module):
    """`toy.world` has a rule of its own; of all others the first name counts."""
    return module if module in BELOW else module.partition(".")[0]


def walk(house, rooms):
    """Yields (module, node) of all code in these rooms."""
    for module, source in house.items():
        if room_of(module) in rooms:
            for node in ast.walk(ast.parse(source)):
                yield module, node


# ------------------------------------------------------------------------------------------ imports


def imported(module, node, known):
    """Our modules that a statement imports: `from a import b` may be of a, or of the module a.b."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:  # from . import x
            above = module.split(".")[: -node.level]
            base = ".".join([*above, base]).strip(".")
        names = [base] + [f"{base}.{alias.name}" for alias in node.names]
    return {name for name in names if name in known}


def wrong_imports(house):
    """Against the rule, wherever in a file they stand."""
    complaints = []
    for module, node in walk(house, BELOW):
        for target in imported(module, node, house):
            allowed = target.partition(".")[0] in BELOW[room_of(module)]
            if not allowed and target != module:
                complaints.append(f"{module}, line {node.lineno}: imports {target}")
    return complaints


def circles(house):
    """Modules that import themselves, by way of others: one that is run as a script, and imported
    by what it imports, would also run twice."""
    graph = {module: set() for module in house}
    for module, node in walk(house, BELOW):
        graph[module] |= imported(module, node, house) - {module}
    complaints = []
    for start in graph:
        reached, front = set(), [start]
        while front:
            new = graph[front.pop()] - reached
            reached |= new
            front += new
        if start in reached:
            complaints.append(f"{start}: imports itself, by way of others")
    return complaints


def dynamic_imports(house):
    """What `ast` cannot follow. (A grader must run a student's file: the exercises may.)"""
    complaints = []
    for module, node in walk(house, set(BELOW) - {"exercises", "tests"}):
        names = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute) and node.attr != "eval":  # a model's .eval()
            names = [node.attr]
        for name in names:
            if name == "importlib.metadata":  # says versions, imports nothing
                break
            if name and name.partition(".")[0] in DYNAMIC:
                complaints.append(f"{module}, line {node.lineno}: {name}")
    return complaints


def unmapped_rooms(house):
    """The map in plumbing/__init__.py names each of its rooms once, and no other."""
    rooms = sorted(name.partition(".")[2] for name in house if name.startswith("plumbing."))
    text = ast.get_docstring(ast.parse(house["plumbing"]), clean=False)
    named = sorted(re.findall(r"(?m)^ {4}(\w+) {2,}\S", text))
    return [] if named == rooms else [f"the map names {named}, there are {rooms}"]


# ------------------------------------------------------------------------------------------- limits


def too_long_files(house):
    """The five files' lines."""
    lines = {name: len(house[name].splitlines()) for name in LIMITS}
    complaints = [
        f"{name}: {lines[name]} lines, at most {most}"
        for name, most in LIMITS.items()
        if lines[name] > most
    ]
    total = sum(lines.values())
    if total > ALL_LINES:
        complaints.append(f"the five files: {total} lines, at most {ALL_LINES}")
    return complaints


def docstring_lines(node):
    """How many lines of a function are its docstring."""
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def unwieldy_functions(house):
    """Too long, or with too many arguments; in all files but the tests and the exercises."""
    complaints = []
    for module, node in walk(house, set(BELOW) - {"exercises", "tests"}):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{module}, line {node.lineno}: {node.name}"
        lines = node.end_lineno - node.lineno + 1 - docstring_lines(node)
        if lines > (MAIN if node.name == "main" else FUNCTION):
            complaints.append(f"{where} has {lines} lines without its docstring")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(a.arg not in ("self", "cls") for a in arguments)
        if count > ARGUMENTS:
            complaints.append(f"{where} has {count} arguments, at most {ARGUMENTS}")
    return complaints


def density(source):
    """-> (expressions a line of code, comments for 100 lines of code); docstrings are no code."""
    code, comments = set(), 0
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in layout:
            code.add(token.start[0])
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                code -= set(range(node.lineno, node.end_lineno + 1))
    expressions = sum(isinstance(node, ast.expr) for node in nodes)
    return expressions / len(code), 100 * comments / len(code)


def dense_files(house):
    """Of the five: written too tightly, or with too few words of why."""
    complaints = []
    for name in LIMITS:
        expressions, comments = density(house[name])
        if expressions > EXPRESSIONS:
            complaints.append(f"{name}: {expressions:.2f} expressions a line, at most 6.0")
        if comments < COMMENTS:
            complaints.append(f"{name}: {comments:.0f} comments for 100 lines of code, 15 at least")
    return complaints


# ----------------------------------------------------------------------------------- the two passes


def called(function):
    """The names that a function calls, and those that the functions inside it call."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            names.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
    return names


def two_passes(house):
    """Who takes the state of the random numbers and replays it: GradCache, and nobody else. (The
    exercises' planted mistakes and the tests' negative controls are wrong copies on purpose.)"""
    owners = []
    for module, node in walk(house, set(BELOW) - {"exercises", "tests"}):
        if isinstance(node, ast.FunctionDef) and {"rng_state", "replay"} <= called(node):
            owners.append(f"{module}.{node.name}")
    right = ["contrastive.two_passes"]
    return [] if owners == right else [f"the two passes stand in {owners}, not in {right}"]


# ---------------------------------------------------------------------------------------- the tests

RULES = (
    wrong_imports,
    circles,
    dynamic_imports,
    unmapped_rooms,
    too_long_files,
    unwieldy_functions,
    dense_files,
    two_passes,
)


@pytest.mark.parametrize("rule", RULES)
def test_the_house_is_in_order(house, rule):
    """Nobody imports what stands above it; sizes, arguments, density; one copy of the two
    passes."""
    equal(rule(house), [], rule.__doc__)


PLAIN = 'import plumbing.errors\n\n# Why this is here.\nx = 1\n"""A word."""\n'
PASSES = "def two_passes():\n    states = rng_state()\n    with replay(states):\n        pass\n"
TREE = {  # a tiny house without a fault
    "plumbing/__init__.py": '"""Rooms.\n\n    errors   what\n    ranks    who\n"""\n',
    "plumbing/errors.py": "import os\n",
    "plumbing/ranks.py": "from plumbing.errors import x\nfrom . import errors\n",
    "toy/world.py": "import random\n",
    "toy/make.py": "import data, model\nfrom toy.world import x\n",
    "data.py": "from toy.world import x\n" + PLAIN,
    "model.py": "from data import x\nmodel = x.eval()\n# Why.\n",
    "pretrain.py": "from model import x\nfrom plumbing import ranks\n" + PLAIN,
    "contrastive.py": PLAIN + PASSES,
    "evaluate.py": "import model\n" + PLAIN,
    "tools/look.py": "import pretrain, contrastive\nfrom tools import pictures\n",
    "tools/pictures.py": "def main(argv):\n    pass\n",
    "exercises/stub.py": "import test_x, evaluate, runpy\n",
    "tests/test_x.py": "import exercises.stub, tools.look, importlib\n",
}
LONG = 'def f():\n    """Doc."""\n' + "    x = 1\n" * 40
LONG_MAIN = "def main():\n" + "    x = 1\n" * 60
WIDE = "def f(self, a, b, c, d, e, *, g, h):\n    pass\n"
FAULTS = [  # (rule, file, what is added to it, what the complaint says)
    (wrong_imports, "plumbing/errors.py", "import data", "plumbing.errors, line 2: imports data"),
    (wrong_imports, "plumbing/ranks.py", "def f():\n    import toy.world", "imports toy.world"),
    (wrong_imports, "toy/world.py", "from plumbing import errors", "imports plumbing.errors"),
    (wrong_imports, "data.py", "import model", "data, line 7: imports model"),
    (wrong_imports, "model.py", "from toy import world", "imports toy.world"),
    (wrong_imports, "pretrain.py", "from contrastive import x", "imports contrastive"),
    (wrong_imports, "evaluate.py", "from tools import look", "imports tools.look"),
    (wrong_imports, "contrastive.py", "import tests.test_x", "imports tests.test_x"),
    (wrong_imports, "tools/look.py", "import exercises.stub", "imports exercises.stub"),
    (circles, "plumbing/errors.py", "from . import ranks", "plumbing.errors: imports itself"),
    (circles, "tools/pictures.py", "from tools.look import x", "tools.look: imports itself"),
    (dynamic_imports, "model.py", "import importlib", "model, line 4: importlib"),
    (dynamic_imports, "data.py", "x = __import__('model')", "data, line 7: __import__"),
    (dynamic_imports, "tools/look.py", "from importlib import import_module", "import_module"),
    (dynamic_imports, "toy/make.py", "exec(x)", "exec"),
    (unmapped_rooms, "plumbing/new.py", "x = 1", "there are ['errors', 'new', 'ranks']"),
    (too_long_files, "evaluate.py", "x = 1\n" * 164, "evaluate: 171 lines, at most 170"),
    (unwieldy_functions, "toy/make.py", LONG, "f has 41 lines without its docstring"),
    (unwieldy_functions, "tools/pictures.py", LONG_MAIN, "main has 61 lines"),
    (unwieldy_functions, "model.py", WIDE, "f has 7 arguments, at most 6"),
    (dense_files, "model.py", "x = [a(b(c(d + e))), f(g(h + i)), j]", "expressions a line"),
    (dense_files, "pretrain.py", "x = 1\n" * 4, "12 comments for 100 lines of code"),
    (two_passes, "plumbing/ranks.py", "def g():\n    rng_state(), m.replay()", "plumbing.ranks.g"),
]


def planted(folder, changes):
    """The tiny house in a folder, with text added to some of its files."""
    for name in {**TREE, **changes}:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(TREE.get(name, "") + changes.get(name, "") + "\n")
    return read_tree(folder)


def test_a_house_in_order_has_no_complaints(tmp_path):
    """The planted house as it stands: the rules ask for nothing else."""
    house = planted(tmp_path, {})
    for rule in RULES:
        equal(rule(house), [], rule.__name__)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0].__name__} {fault[1]}")
def test_each_fault_is_found(tmp_path, fault):
    """Negative control: one thing wrong in the planted house, and its rule says so."""
    rule, file, text, says = fault
    complaints = rule(planted(tmp_path, {file: text}))
    expect(any(says in c for c in complaints), complaints, says, rule.__doc__)


def test_what_is_wrong_with_all_files_together_is_found(tmp_path):
    """Negative control: each file within its limit, all together not; no two passes anywhere."""
    house = planted(tmp_path, {})
    for name, most in LIMITS.items():
        house[name] = "#\n" * (most if name != "evaluate" else 111)
    equal(too_long_files(house), ["the five files: 1251 lines, at most 1250"], "their sum")
    equal(two_passes(house), ["the two passes stand in [], not in ['contrastive.two_passes']"], "")
