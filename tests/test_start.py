"""plumbing/start.py reads a script's Config without running the script: the same flags, in the same
words, as the script itself declares. (That no torch is loaded: test_ending.py.)"""

import dataclasses
import sys
from pathlib import Path

import pytest
from checks import equal

import contrastive
import evaluate
import pretrain
from plumbing import config, start
from tools import check, explain, export, figures, generate, look, merge, search

SCRIPTS = [pretrain, contrastive, evaluate, check, explain, export, figures, generate, look, merge]


def declared(kind):
    """A Config's fields, as far as a command line can tell."""
    return [(x.name, x.type, x.default, dict(x.metadata), x.init) for x in dataclasses.fields(kind)]


@pytest.mark.parametrize("script", [*SCRIPTS, search], ids=lambda x: x.__name__)
def test_what_is_read_is_what_is_declared(script):
    """Names, kinds, defaults, words, ranges, choices; and a class that parses."""
    read = start.read_config(Path(script.__file__))
    equal(declared(read), declared(script.Config), "read_config")
    equal(issubclass(read, config.CommandLine), True, "its base")
    equal(read.__module__, "__main__", "whose docstring the help begins with")


def test_a_script_without_a_config_is_none(tmp_path):
    """A class of another name is not taken for it."""
    (tmp_path / "x.py").write_text("class Other:\n    a: int = 1\n")
    with pytest.raises(LookupError, match="x.py has no Config"):
        start.read_config(tmp_path / "x.py")


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_ends_the_process_with_status_0(word, monkeypatch, capsys):
    """Both words for it, and before the script goes on; other words do not."""
    script = Path(pretrain.__file__)
    ends = []
    monkeypatch.setattr(start, "watch_signals", lambda: None)
    monkeypatch.setattr(start, "leave", lambda status: ends.append(status))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "3", word])
    start.begin()
    equal(ends, [0], "leave(status=0)")
    said = capsys.readouterr().out
    assert "--question-first" in said and "optimiser steps" in said, said
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "3"])
    start.begin()
    equal((ends, capsys.readouterr().out), ([0], ""), "no help is asked for")


@pytest.mark.parametrize("script", [check, export, figures, merge], ids=lambda x: x.__name__)
def test_a_word_that_is_needed_has_no_default(script):
    """`python -m tools.merge` alone says what it lacks, instead of merging nothing."""
    words = [x for x in dataclasses.fields(script.Config) if x.metadata.get("shown")]
    needed = [x.name for x in words if x.default is dataclasses.MISSING]
    equal(needed, [x.name for x in words], "config.word")
