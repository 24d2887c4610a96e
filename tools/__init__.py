"""Commands that no training needs, `python -m tools.NAME`, and what they are made of. No stage
imports them."""
