"""Stage 2 with a part of stage 1 in it: for the first steps the K tokens of one side of a pair must
also tell the text of the other (Bottleneck Tokens, arXiv 2604.11095).

    python -m tools.condense --model toy                           the toy world, no stage 1
    python -m tools.condense                                       from out/pretrain, if it is there
    torchrun --nproc-per-node 2 -m tools.condense --data MMEB-train     with the flags of stage 2,
                                                                   but --fsdp and --max-length

The loss is InfoNCE + --condense x the next-token loss of that text, read from head and C alone,
under stage 1's mask: of each pair the target's text, from the query's C; where the target has a
picture, the query's text from the target's C; where both have pictures, nothing. In log.jsonl
`loss` is the sum of both.

It is stage 1's own step (pretrain.accumulate) beside stage 2's own: one more pass of these rows,
exact over chunks and ranks, for it is a plain sum over tokens.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import contrastive
import pretrain
from data import Pair
from plumbing import ranks
from plumbing.config import flag
from plumbing.errors import InputError
from plumbing.loader import each


@dataclass
class Config(contrastive.Config):
    """Flags of stage 2, and two more."""

    out: str = flag("out/condense", "folder for the model, log.jsonl and checkpoints")
    condense: float = flag(5.0, "weight of the text's loss", above=0)
    condense_share: float = flag(0.4, "of the steps, the first ones, that have it", above=0, most=1)


class Batch(NamedTuple):
    """contrastive.Batch, with this rank's rows that end in a text which C must tell."""

    rows: list
    labels: object
    keys: object
    ids: list
    examples: list  # of pretrain.Example; none after the first steps


def side_and_text(pair: Pair):
    """-> (the side that is compressed, the text that its C must tell), or None: see above."""
    query, target = pair.query, pair.targets[0]
    if not target.images:
        return query, target.text
    if not query.images:
        return target, query.text
    return None


def local_batch(pairs, collate, cfg, step, rank, world) -> Batch:
    """contrastive.local_batch, and the rows of its pairs that have a text to tell."""
    batch = contrastive.local_batch(pairs, collate, cfg, step, rank, world)
    chosen, ids = [], []
    if step < cfg.condense_share * cfg.steps:
        share = cfg.batch // world
        for name, i in contrastive.draw(pairs, cfg, step)[rank * share : (rank + 1) * share]:
            side = side_and_text(pairs[name][i])
            if side:
                chosen.append(side)
                ids.append(f"{name}[{i}]")

    def row_of(side):
        item, text = side
        return collate.row(item, [("", text)])  # no question: the text is the answer

    rows = each(row_of, chosen)
    examples = [pretrain.Example(row, id=name) for row, name in zip(rows, ids, strict=True)]
    return Batch(*batch, examples)


def condensing_step(cfg, embedder, batch, temperature, budget, loss_fn) -> contrastive.Step:
    """contrastive.gradcache_step, and cfg.condense times the gradient of the texts' loss, the mean
    over *all ranks'* tokens."""
    if not embedder.K:
        raise InputError("K = 0, as the model or its --prompt has it: condense trains K tokens")
    step = contrastive.gradcache_step(embedder, batch, temperature, budget, loss_fn)
    if not ranks.all_sum(len(batch.examples)):
        return step
    parameters = [p for p in embedder.parameters() if p.requires_grad]
    matching = [p.grad for p in parameters]
    embedder.zero_grad(set_to_none=True)
    # The step's chunks, for they may be half of the flag's by now.
    nats, _, _ = pretrain.accumulate(embedder, batch.examples, step.chunk_tokens)
    ranks.sum_gradients(parameters)
    for p, matched in zip(parameters, matching, strict=True):
        p.grad.mul_(cfg.condense).add_(matched)
    return step._replace(loss=step.loss + cfg.condense * nats)


def main(cfg):
    """Stage 2, with another batch and another step."""
    if cfg.fsdp:
        raise InputError("--fsdp: tools.condense trains whole weights on each rank; leave it out")
    if cfg.max_length:
        text = "a text that C must tell is never cut; leave it out, and too long pairs, too"
        raise InputError(f"--max-length: {text}")
    contrastive.main(cfg, local_batch, partial(condensing_step, cfg))


if __name__ == "__main__":
    ranks.run(main, Config)
