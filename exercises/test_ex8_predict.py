"""Exercise 8: numbers predicted on paper, against what our code gives. The truth is not printed."""

import pytest
from checks import expect

from exercises.questions import QUESTIONS

pytestmark = pytest.mark.ex8


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_prediction_is_what_running_the_code_gives(student, question):
    """Within half a hundredth."""
    got, (compute, hint) = student.PREDICTIONS.get(question), QUESTIONS[question]
    expect(isinstance(got, int | float), f"{question}: {got!r}", "a number", "PREDICTIONS")
    expect(abs(got - compute()) <= 0.0051, f"{question}: {got}", "another number", hint)
