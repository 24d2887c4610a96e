"""The walks through one example print what the functions compute."""

import re

import contrastive
import pretrain


def test_stage_1_is_walked_through(capsys):
    """Roles, labels, the mask (drawn as the function makes it), one line of loss a token."""
    pretrain.main(pretrain.Config(explain=True, workers=0))
    said = capsys.readouterr().out
    drawn = re.findall(r"^  ([hxCQA]) ([#.]+)$", said, re.MULTILINE)
    letters = "".join(letter for letter, _ in drawn)
    assert re.fullmatch("hx+C{4}(Q+A+){2}", letters), letters
    for i, (letter, line) in enumerate(drawn):
        want = ["#" if j <= i and not (letter in "QA" and letters[j] == "x") else "."
                for j in range(len(letters))]  # fmt: skip
        assert line == "".join(want), f"row {i}"
    assert said.count("  p = ") == letters.count("A"), "each answer token once"
    assert "with the mask off" in said and re.search(r"logits +\(\d+, \d+\)", said)


def test_stage_2_is_walked_through(capsys):
    """Several chunks, and a gradient that is the whole batch's."""
    contrastive.main(contrastive.Config(model="toy-random", explain=True, workers=0))
    said = capsys.readouterr().out
    assert said.count("gradient so far") >= 3, said
    assert len(re.findall(r"-?\d\.\d\d\*", said)) == 6, "each query has its own target"
    assert float(re.search(r"differ by (\S+) of it", said)[1]) < 1e-5
    assert "\n  0.0 MiB kept for the backward pass" in said, "pass 1 keeps nothing"
