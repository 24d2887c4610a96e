"""One-line mistakes for mutate.py: (file, the text, which stands once in it, what stands there
instead, the tests that should notice, as words for pytest)."""

from typing import NamedTuple

from mutations_files import FILES
from mutations_five import FIVE
from mutations_fresh import FRESH
from mutations_rooms import ROOMS
from mutations_tools import TOOLS


class Mutation(NamedTuple):
    file: str
    old: str  # stands exactly once in the file
    new: str
    tests: str


MUTATIONS = [Mutation(*m) for m in FIVE + ROOMS + FILES + FRESH + TOOLS]
