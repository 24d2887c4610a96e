"""Mistakes in the five files; see mutations.py."""

FIVE = [
    (
        "pretrain.py", "roles[:, :, None] > COMPRESS", "roles[:, :, None] >= COMPRESS",
        "tests/test_mask.py",
    ),
]  # fmt: skip
