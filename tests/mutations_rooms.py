"""Mistakes in plumbing/; see mutations.py."""

ROOMS = [
    (
        "plumbing/optim.py", "(1 + math.cos(math.pi * past)) / 2", "math.cos(math.pi * past)",
        "tests/test_scripts.py",
    ),
]  # fmt: skip
