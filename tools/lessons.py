"""What the toy MLLM learns last: where one of several objects that are alike is, and what stands
beside it.

    torchrun --nproc-per-node 2 -m tools.lessons --model out/toy ...    (see toy/make.py)
    python -m tools.lessons --model out/toy ...                         on one core

Stage 1 as it is, with other dialogues about the toy world: more objects, of few colours or of few
shapes, and mostly the questions for which that matters. In ordinary dialogues such a case is rare,
and after 2,500 steps of them it is what is still wrong: of two red objects side by side, the model
tells the other one's place. --data, --caption and --texts ask for other dialogues, and are refused.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
from dataclasses import dataclass

import pretrain
from plumbing import ranks
from plumbing.config import flag
from plumbing.errors import InputError
from toy.world import ASK, COLORS, IMAGE, SEEN, SHAPES, Shapes


@dataclass
class Config(pretrain.Config):
    """Flags of stage 1, and one more."""

    out: str = flag("out/lessons", "folder for the model, log.jsonl and checkpoints")
    least: int = flag(3, "fewest objects in half of the pictures", least=1, most=4)


def lesson(world, i, least=3) -> tuple:
    """A harder Shapes.dialogue, three to six questions. -> (content, turns, id)."""
    rng = world._rng("lesson", i)
    choice = SEEN
    if rng.random() < 0.5:
        part = rng.choice((COLORS, SHAPES))
        few = rng.sample(list(part), rng.randint(1, 3))
        choice = [names for names in SEEN if set(names) & set(few)]
    scene = world.scene(rng, rng.choice((1, least)), 4, choice)
    kinds = ["next", "next", "place", "place", "at", rng.choice(list(ASK))]
    rng.shuffle(kinds)
    turns = {question: answer for _, question, answer in world.ask(rng, scene, kinds)}
    return (IMAGE, (scene,)), tuple(turns.items()), f"lesson-{i}"


def main(cfg):
    """Stage 1, with lessons in the place of dialogues."""
    if cfg.data != "shapes" or cfg.caption or cfg.texts:
        raise InputError("--data, --caption, --texts: lessons are the toy world's; leave them out")
    Shapes.dialogue = lambda world, i, **_: lesson(world, i, cfg.least)
    pretrain.main(cfg)


if __name__ == "__main__":
    ranks.run(main, Config)
