"""The class: the papers' ideas, written by students and graded by this repository's own tests."""
