"""Exercise 10: the arithmetic of an ablation. Whether the runs were made, no test can know."""

import math

import pytest
from checks import expect

pytestmark = pytest.mark.ex10


def arms(student):
    table = student.ABLATION
    expect(isinstance(table, dict), table, "a dict", "its form: EXERCISES.md")
    found = table.get("arms", {})
    expect(len(found) == 2, list(found), "two arms", "change one thing")
    return table, list(found.values())


def spread(scores):
    """(mean, standard error of the mean: sample deviation / root of n) of a dict seed -> score."""
    x = [float(v) for v in scores.values()]
    mean = sum(x) / len(x)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))


def test_two_arms_with_the_same_three_seeds_or_more(student):
    """A question, a command for each arm, one score for each seed."""
    table, found = arms(student)
    expect(str(table.get("question", "")).strip(), table, "a question", "what is asked?")
    commands = [str(a.get("command", "")).strip() for a in found]
    expect(all(commands) and len(set(commands)) == 2, commands, "two commands", "what differs?")
    seeds = [sorted(map(str, a["scores"])) for a in found]
    expect(min(map(len, seeds)) >= 3, seeds, "at least 3 seeds", "two runs give no error bar")
    expect(seeds[0] == seeds[1], seeds, "the same seeds", "else luck differs between the arms")
    numbers = [float(v) for a in found for v in a["scores"].values()]
    expect(all(0 <= v <= 100 for v in numbers), numbers, "0 to 100", "Precision@1 x 100")
    expect(len(set(numbers)) > 2, numbers, "scores that differ", "is --seed read?")


def test_means_and_standard_errors(student):
    """To two decimals."""
    for a in arms(student)[1]:
        mean, se = spread(a["scores"])
        expect(abs(a["mean"] - mean) <= 0.0051, a["mean"], "sum / n", "mean over seeds")
        expect(abs(a["se"] - se) <= 0.0051, a["se"], "deviation / sqrt(n)", "divide by n - 1")


def test_the_difference_and_what_may_be_said(student):
    """Second arm minus first, root of the summed squares of the errors; beyond two of those it is
    "higher" or "lower", else "cannot tell"."""
    table, (a, b) = arms(student)
    (mean_a, se_a), (mean_b, se_b) = spread(a["scores"]), spread(b["scores"])
    difference, se = mean_b - mean_a, math.hypot(se_a, se_b)
    expect(abs(table["difference"] - difference) <= 0.0051, table["difference"], "b - a", "sign?")
    expect(abs(table["difference_se"] - se) <= 0.0051, table["difference_se"], "sqrt", "squares")
    want = "cannot tell" if abs(difference) <= 2 * se else "higher" if difference > 0 else "lower"
    expect(table["conclusion"] == want, table["conclusion"], "what 2 errors allow", "see above")
