"""Exercise 10: the arithmetic of an ablation. Whether the runs were made, no test can know."""

import math

import pytest
from checks import expect

pytestmark = pytest.mark.ex10
FORM = "its form: exercises/README.md"
HALF = 0.0051  # of the last decimal, when two are asked for
WORDS = ("higher", "lower", "cannot tell")


def arms(student):
    """-> (the table, [first arm, second arm]); fails where it does not have the form."""
    table = student.ABLATION
    expect(isinstance(table, dict), table, "a dict", FORM)
    both = table.get("arms")
    expect(isinstance(both, dict) and len(both) == 2, both, "a dict of two arms", "one change")
    for arm in both.values():
        scores = arm.get("scores") if isinstance(arm, dict) else arm
        complete = isinstance(scores, dict) and len(scores) > 1
        numbers = complete and all(isinstance(v, int | float) for v in scores.values())
        expect(numbers, scores, "scores: {seed: number, …}", FORM)
    return table, list(both.values())


def near(where, name, want, formula, hint, within=HALF):
    got = where.get(name)
    ok = isinstance(got, int | float) and abs(got - want) <= within
    expect(ok, f"{name}: {got}", formula, hint)


def conclusion(difference, se):
    """What may be said of a difference with this standard error."""
    if abs(difference) <= 2 * se:
        return "cannot tell"
    return "higher" if difference > 0 else "lower"


def spread(scores):
    """(mean, standard error of the mean: sample deviation / root of n) of a dict seed -> score."""
    x = list(scores.values())
    mean = sum(x) / len(x)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))


def test_two_arms_with_the_same_three_seeds_or_more(student):
    """A question, a command for each arm, one score for each seed."""
    table, (first, second) = arms(student)
    expect(str(table.get("question", "")).strip(), table, "a question", "what is asked?")
    commands = [str(arm.get("command", "")).strip() for arm in (first, second)]
    expect(all(commands) and len(set(commands)) == 2, commands, "two commands", "what differs?")
    seeds = [sorted(map(str, arm["scores"])) for arm in (first, second)]
    expect(min(map(len, seeds)) >= 3, seeds, "at least 3 seeds", "two runs give no error bar")
    expect(seeds[0] == seeds[1], seeds, "the same seeds", "else luck differs between the arms")
    numbers = [*first["scores"].values(), *second["scores"].values()]
    expect(all(0 <= v <= 100 for v in numbers), numbers, "0 to 100", "Precision@1 x 100")
    expect(len(set(numbers)) > 2, numbers, "scores that differ", "is --seed read?")


def test_means_and_standard_errors(student):
    """To two decimals."""
    for arm in arms(student)[1]:
        mean, se = spread(arm["scores"])
        near(arm, "mean", mean, "sum / n", "mean over seeds")
        near(arm, "se", se, "deviation / sqrt(n)", "divide by n - 1")


def test_the_difference_and_what_may_be_said(student):
    """Second arm minus first, root of the summed squares of the errors; beyond two of those the
    second arm is "higher" or "lower", else "cannot tell". From the numbers themselves, or from
    those of two decimals."""
    table, (first, second) = arms(student)
    (mean_1, se_1), (mean_2, se_2) = spread(first["scores"]), spread(second["scores"])
    difference, se = mean_2 - mean_1, math.hypot(se_1, se_2)
    within = 3 * HALF  # of two rounded numbers, and rounded again
    near(table, "difference", difference, "second mean - first mean", "sign?", within)
    hint = "the root of the sum of the squares"
    near(table, "difference_se", se, "sqrt(se^2 + se^2)", hint, within)
    own = conclusion(table["difference"], table["difference_se"])
    hint = f"|difference| {abs(difference):.2f} against 2 x difference_se {2 * se:.2f}"
    got = table.get("conclusion")
    expect(got in WORDS, repr(got), " | ".join(WORDS), "one of these three, as it is written")
    expect(got in (own, conclusion(difference, se)), got, "what they allow", hint)
