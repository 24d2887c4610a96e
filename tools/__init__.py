"""Commands that no training needs, one a file: `python -m tools.NAME`. Nobody imports them."""
