"""Stage 1, compression pre-training (CoMa, arXiv 2511.08480, section 3.1).

    python pretrain.py                                             the toy MLLM learns to compress
        (two cores: 3.7 minutes, 79 % of the answers right from the code alone)
    python pretrain.py --data talks.jsonl --image-root pictures    your own dialogues
    python pretrain.py --explain                                   one example, in numbers
    torchrun --nproc-per-node 8 pretrain.py --model Qwen/Qwen2.5-VL-3B-Instruct ...  (see README)

A picture, then K learnable compression tokens, then a dialogue about the picture:

    [image] C_1 ... C_K  Q_1 A_1 Q_2 A_2 ...

Attention is causal, but what stands after C never sees what stands before C. Trained to answer
questions that it cannot foresee, the model must put all of the picture into the K tokens.

Reads dialogues; writes OUT/ (a transformers folder), OUT/log.jsonl, OUT/checkpoints.
"""

import copy
import functools
import importlib
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import model
from data import ANSWER, COMPRESS, CONTENT, PAD, InputError, Item, read_dialogues, ready
from model import flag


@dataclass
class Config(model.Config):
    """Flags of stage 1."""

    out: str = flag("out/pretrain", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(400, "optimiser steps")
    compress: bool = flag(True, "off: no mask, plain instruction tuning (K tokens stay if K > 0)")
    turns: int = flag(0, "questions kept of each dialogue; 0: all; 1: the single-turn ablation")
    caption: bool = flag(False, "a full description in place of the dialogue (toy world)")
    question_first: float = flag(0.0, "beyond the paper: share of dialogues with Q_1 before C")
    texts: float = flag(0.0, "beyond the paper: share of dialogues about a text (toy world)")
    objective: str = flag("ce", "the answers, or the uncompressed model", ["ce", "kl"])
    explain: bool = flag(False, "walk through one example in numbers, and train nothing")


# ---------------------------------------------------------------------------------------- the idea


def compression_mask(roles) -> torch.Tensor:
    """Who may attend to whom (CoMa, section 3.1): bool (B, 1, L, L), True = may attend.

    roles (B, L), see data.py. Causal, nobody attends to padding, and what follows the compression
    tokens does not see the content before them: all it knows of the picture went through C."""
    L = roles.shape[1]
    i = torch.arange(L, device=roles.device)
    causal = i[:, None] >= i[None, :]  # (L, L) row attends to column
    hidden = (roles[:, :, None] > COMPRESS) & (roles[:, None, :] == CONTENT)  # (B, L, L)
    # Trap: a padding row that may attend to nothing makes NaN; each token may attend to itself.
    mask = causal & ~hidden & (roles != PAD)[:, None, :] | (i[:, None] == i[None, :])
    return mask[:, None]


def answer_labels(input_ids, roles) -> torch.Tensor:
    """labels[b, i] = the token that position i must predict, -100 where that is no answer token.

    Differs from the official code, which leaves question and template tokens in: the paper's
    objective is P(A | C, Q). (B, L), (B, L) -> (B, L)."""
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:].masked_fill(roles[:, 1:] != ANSWER, -100)
    return labels


def answer_loss(logits, labels) -> torch.Tensor:
    """Next-token cross-entropy over answer tokens only: their *sum*, in nats (a mean over chunks
    and ranks of unequal answers would not be the mean over tokens). logits (n, V), labels (n,)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def distillation_loss(logits, reference) -> torch.Tensor:
    """The paper's ablation: KL(reference || model), nats, summed over positions. Both (n, V)."""
    p, q = (F.log_softmax(x.float(), dim=-1) for x in (reference, logits))
    return F.kl_div(q, p, reduction="sum", log_target=True)


def answer_logits(embedder, inputs, compress=True):
    """-> (logits (n, V), labels (n,)) of the n positions that predict an answer token."""
    mask = compression_mask(inputs["roles"]) if compress and embedder.K else None
    h = embedder.hidden(inputs, mask)  # (B, L, D)
    labels = answer_labels(inputs["input_ids"], inputs["roles"])
    return embedder.logits(h[labels != -100]), labels[labels != -100]


def exact_answers(logits, labels, inputs) -> tuple:
    """How many answers greedy decoding would give word for word: (right, all).

    Each step of greedy decoding picks the argmax; it writes the answer if and only if the argmax is
    right at every position of it, given the right words before."""
    is_answer = inputs["roles"] == ANSWER
    starts = is_answer & ~F.pad(is_answer, (1, 0))[:, :-1]
    which = starts[is_answer].cumsum(0)  # (n,) the answer that a token belongs to
    spoilt = which[logits.argmax(-1) != labels].unique()
    total = int(starts.sum())
    return total - len(spoilt), total


# ---------------------------------------------------------------------------------------- plumbing


def teacher(embedder):
    """The KL objective's frozen reference: the model as it is now, the picture visible, the same
    dialogue without C. -> (its collator, function(rows) -> logits (n, V))."""
    frozen = copy.deepcopy(embedder.mllm).eval().requires_grad_(False)
    plain = model.Embedder(frozen, embedder.processor, 0, "last", embedder.style)

    @torch.no_grad()
    def logits(rows):
        return answer_logits(plain, plain.collate.pad_rows(rows, embedder.device), False)[0]

    return plain.collate, logits


def accumulate(embedder, rows, cfg, reference=None):
    """Adds to `.grad` the gradient of the mean loss over *all ranks'* answer tokens, a chunk at a
    time: exact for any chunks and ranks, however long their answers.

    rows: this rank's, {"row": ..., "plain": the same without C, for the KL objective}.
    -> (mean loss in nats, share of answers that are right word for word, answer tokens)."""
    totals = [0.0, 0, 0]
    tokens = sum(int((r["row"]["tokens"]["roles"] == ANSWER).sum()) for r in rows)
    tokens = model.all_sum(tokens)
    budget = model.by_device(cfg.chunk_tokens, model.CHUNK_TOKENS, embedder.device)
    for chunk in model.token_chunks(model.row_lengths([r["row"] for r in rows]), budget):
        inputs = embedder.collate.pad_rows([rows[i]["row"] for i in chunk], embedder.device)
        logits, labels = answer_logits(embedder, inputs, cfg.compress)
        if reference:
            loss = distillation_loss(logits, reference([rows[i]["plain"] for i in chunk]))
        else:
            loss = answer_loss(logits, labels)
        (loss / tokens).backward()
        right, count = exact_answers(logits.detach(), labels, inputs)
        totals = [totals[0] + loss.item(), totals[1] + right, totals[2] + count]
    loss, right, count = (model.all_sum(x) for x in totals)
    return loss / tokens, right / count, tokens


@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    """An order of n dialogues; the toy world's are as good as shuffled."""
    return range(n) if n >= 10**8 else np.random.default_rng((seed, epoch)).permutation(n)


def draw(n, cfg, step, rank, world) -> list:
    """Indices of this rank's share of the batch: a pure function of (seed, step). Each epoch takes
    all n dialogues once, in an order of its own."""
    mine = range(step * cfg.batch + rank, (step + 1) * cfg.batch, world)
    return [int(shuffled(n, cfg.seed, j // n)[j % n]) for j in mine]


def ask_first(d, cfg, step):
    """An idea beyond the paper: in a share of the dialogues the first question stands before the
    code, as an instruction does in stage 2, and its answer is the first thing asked of the code."""
    if random.Random(f"{cfg.seed}/{step}/{d.id}").random() >= cfg.question_first:
        return d
    (question, answer), *rest = d.turns
    item = Item(f"{d.item.text} {question}", d.item.images)
    return d._replace(item=item, turns=(("", answer), *rest))


def main(cfg):
    """Stage 1, from flags to a saved folder."""
    # 1. The model, and what of it is trained.
    device = model.setup()
    rank, world = model.rank(), model.world()
    if cfg.batch < world:
        raise InputError(f"--batch {cfg.batch} leaves ranks without work; try {world}")
    if cfg.objective == "kl" and cfg.max_length:
        raise InputError("--objective kl: model and teacher need the same answers; --max-length 0")
    torch.manual_seed(cfg.seed)
    embedder = model.load_for(cfg, device)
    plain, reference = teacher(embedder) if cfg.objective == "kl" else (None, None)
    model.choose_trained(embedder, cfg)
    optimizers = model.make_optimizers(embedder, cfg)

    # 2. The data: dialogues, made into model inputs in the loader's workers.
    root = cfg.image_root or None
    dialogues = read_dialogues(cfg.data, root, cfg.seed, cfg.turns, cfg.caption, cfg.texts)
    cfg.data_digest = ready([dialogues])

    if cfg.explain:
        explain = importlib.import_module("explain")
        return explain.stage1(embedder, dialogues[0], cfg.compress)

    def rows_of(step):
        rows = []
        for i in draw(len(dialogues), cfg, step, rank, world):
            d = ask_first(dialogues[i], cfg, step)
            rows.append(dict(row=embedder.collate.row(d.item, d.turns), id=d.id))
            if plain:
                rows[-1]["plain"] = plain.row(d.item, d.turns)
        return rows

    # 3. Train.
    start = model.start_or_resume(embedder, optimizers, cfg)
    model.say(f"{len(dialogues):,} dialogues, {cfg.batch} a step over {world} rank(s)")
    log = model.Log(cfg, start)
    embedder.train()
    batches = model.prefetch(rows_of, range(start, cfg.steps), cfg.workers)
    for step, rows in log.steps(batches):
        # ------------------------------------------------------------------------------------------
        lr = model.begin_step(optimizers, step, cfg)
        loss, right, tokens = accumulate(embedder, rows, cfg, reference)
        model.sum_gradients(embedder.parameters())
        norm = model.end_step(embedder, optimizers, cfg, step, loss, [r["id"] for r in rows])
        # ------------------------------------------------------------------------------------------
        numbers = dict(loss=loss, exact=right, norm=norm, lr=lr)
        log(step, (tokens, "answer tokens"), **numbers, cut=sum(r["row"]["cut"] for r in rows))
        model.maybe_checkpoint(embedder, optimizers, cfg, step)

    # 4. Save. With K = 0 it is a plain instruction-tuned MLLM, and no embedder.
    model.finish(embedder, cfg, embedding=embedder.K > 0)


if __name__ == "__main__":
    model.run(main, Config)
