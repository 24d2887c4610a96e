"""Stage 1, compression pre-training (CoMa, arXiv 2511.08480, section 3.1).

    python pretrain.py                                             the toy MLLM learns to compress
        (two cores: 3.3 minutes, 72 % of the answers right from the code alone)
    python pretrain.py --data talks.jsonl --image-root pictures    your own dialogues
    torchrun --nproc-per-node 8 pretrain.py --model Qwen/Qwen2.5-VL-3B-Instruct ...  (see README)
    python -m tools.explain pretrain                               one example, in numbers

A picture, then K learnable compression tokens, then a dialogue about the picture:

    [image] C_1 ... C_K  Q_1 A_1 Q_2 A_2 ...

Attention is causal, but what stands after C never sees the content before C. Trained to answer
questions that it cannot foresee, the model must put all of the picture into the K tokens.

Reads dialogues; writes OUT/ (a transformers folder, or a LoRA adapter), OUT/log.jsonl, and
OUT/checkpoints until the run is over.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import ANSWER, COMPRESS, CONTENT, PAD, Row, read_dialogues
from model import Embedder, choose_trained, load_for, save
from plumbing import checkpoint, combinations, optim, ranks
from plumbing.config import CHUNK_TOKENS, TrainingFlags, by_device, flag
from plumbing.formats import Place, checked_digest
from plumbing.loader import each, prefetch
from plumbing.log import Log
from plumbing.memory import all_ranks_or_none, to_device, token_chunks, unless_overdue
from plumbing.sampling import ask_first, epoch_batch, skipped_dialogues, tokens_cut
from plumbing.weights import Settings


@dataclass
class Config(TrainingFlags):
    """Flags of stage 1."""

    out: str = flag("out/pretrain", "folder for the model, log.jsonl and checkpoints")
    steps: int = flag(250, "optimiser steps; 0: the model as it is", least=0)
    compress: bool = flag(True, "off: no mask, plain instruction tuning (K tokens stay if K > 0)")
    turns: int = flag(0, "questions kept of each dialogue; 0: all; 1: as in an ablation", least=0)
    caption: bool = flag(False, "a full description in place of the dialogue (toy world)")
    question_first: float = flag(
        0.0, "beyond the paper: share of dialogues with Q_1 before C", least=0, most=1
    )
    texts: float = flag(0.0, "beyond the paper: share about texts (toy world)", least=0, most=1)
    objective: str = flag("ce", "ce: learn answers; kl: imitate the model without C", ["ce", "kl"])


# ---------------------------------------------------------------------------------------- the idea


def compression_mask(roles) -> torch.Tensor:
    """Who may attend to whom (CoMa, section 3.1): bool (B, 1, L, L), True = may attend.

    roles (B, L): PAD < HEAD < CONTENT < COMPRESS < QUESTION < ANSWER, see data.py. Causal, nobody
    attends to padding, and what follows C does not see the content before it."""
    i = torch.arange(roles.shape[1], device=roles.device)  # (L,)
    causal = i[:, None] >= i[None, :]  # (L, L) row attends to column
    after_code = roles[:, :, None] > COMPRESS  # (B, L, 1) the rows of questions and answers
    is_content = roles[:, None, :] == CONTENT  # (B, 1, L) picture and text; HEAD stays visible
    is_real = roles[:, None, :] != PAD  # (B, 1, L)
    mask = causal & is_real & ~(after_code & is_content)  # (B, L, L)
    # Trap: a row of left padding would see nothing, which makes NaN; so each token sees itself.
    mask = mask | (i[:, None] == i[None, :])
    return mask[:, None]


def answer_labels(input_ids, roles) -> torch.Tensor:
    """labels[b, i] = the token that position i must predict, -100 where that is no answer token.

    Differs from the official code, which leaves question and template tokens in: the paper's
    objective is P(A | C, Q). (B, L), (B, L) -> (B, L)."""
    labels = torch.full_like(input_ids, -100)  # (B, L) what cross_entropy ignores
    is_answer = roles[:, 1:] == ANSWER  # (B, L - 1) of the next token
    labels[:, :-1] = input_ids[:, 1:].where(is_answer, -100)
    return labels


def answer_loss(logits, labels) -> torch.Tensor:
    """-log P(A | C, Q): cross-entropy of the answer tokens alone, their *sum*, in nats (the mean of
    chunks' or ranks' means would not be the mean over tokens). logits (n, V), labels (n,)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def distillation_loss(logits, teacher_logits) -> torch.Tensor:
    """The paper's ablation: KL(teacher || model), nats, summed over positions. Both (n, V)."""
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def answer_logits(embedder, inputs, compress=True):
    """-> (logits (n, V), labels (n,)) of the n positions that predict an answer token."""
    roles = to_device(inputs["roles"], embedder.device)
    mask = compression_mask(roles) if compress and embedder.K else None
    h = embedder.hidden(inputs, mask)  # (B, L, D)
    labels = answer_labels(inputs["input_ids"], inputs["roles"])  # (B, L)
    is_label = labels != -100
    return embedder.logits(h[is_label]), to_device(labels[is_label], h.device)


def exact_answers(logits, labels, roles) -> tuple:
    """How many answers greedy decoding would give word for word: (right, all).

    It picks the argmax at each step, so it writes an answer if and only if the argmax is right at
    every token of it, given the right ones before. logits (n, V), labels (n,), roles (B, L)."""
    is_answer = roles == ANSWER  # (B, L)
    starts = is_answer.clone()  # (B, L) the first token of each answer
    starts[:, 1:] &= ~is_answer[:, :-1]
    answer_of = starts[is_answer].cumsum(0)  # (n,) number of each token's answer, as in logits
    is_wrong = (logits.argmax(-1) != labels).cpu()  # (n,)
    total = int(starts.sum())
    return total - len(answer_of[is_wrong].unique()), total


# ------------------------------------------------------------------------------ one training step


class Example(NamedTuple):
    """A dialogue as model inputs."""

    row: Row
    teacher_row: Row | None = None  # the same without C, for the KL objective
    id: str = ""  # of the dialogue


def accumulate(embedder, examples, chunk_tokens=None, compress=True, teacher_logits=None):
    """Adds to `.grad` this rank's part of the gradient of the mean loss over *all ranks'* answer
    tokens, in chunks of `chunk_tokens` padded tokens: the sum over ranks is exact for any chunks.

    examples: this rank's; compress: with the mask; teacher_logits: see `teacher`, for KL.
    -> (mean loss in nats, share of answers that are right word for word, answer tokens)."""
    rows = [example.row for example in examples]
    my_tokens = sum(int((row.tokens["roles"] == ANSWER).sum()) for row in rows)
    tokens = ranks.all_sum(my_tokens)  # the sum over chunks and ranks, divided by it, is the mean
    loss_sum, right, answers = 0.0, 0, 0
    chunk_tokens = by_device(chunk_tokens, CHUNK_TOKENS, embedder.device)
    with all_ranks_or_none():
        for chunk in unless_overdue(token_chunks([row.length for row in rows], chunk_tokens)):
            inputs = embedder.collate.pad_rows([rows[i] for i in chunk])
            logits, labels = answer_logits(embedder, inputs, compress)
            if teacher_logits:
                loss = distillation_loss(logits, teacher_logits([examples[i] for i in chunk]))
            else:
                loss = answer_loss(logits, labels)
            chunk_right, chunk_answers = exact_answers(logits, labels, inputs["roles"])
            loss_sum += loss.item()
            right += chunk_right
            answers += chunk_answers
            (loss / tokens).backward()  # last: a GPU works while the next chunk is padded
    mean = ranks.all_sum(loss_sum) / tokens
    exact = ranks.all_sum(right) / ranks.all_sum(answers)
    return mean, exact, tokens


def teacher(embedder):
    """The KL objective's frozen teacher: the model as it is now, which reads the same dialogues
    without C, the picture visible. -> (its collator, function(Examples) -> logits (n, V))."""
    frozen = copy.deepcopy(embedder.mllm).eval().requires_grad_(False)
    # K = 0: its rows have no code, and its mask is off.
    uncompressed = Embedder(frozen, embedder.processor, Settings(0, "last", embedder.style))

    @torch.no_grad()
    def logits(examples):
        inputs = uncompressed.collate.pad_rows([x.teacher_row for x in examples])
        return answer_logits(uncompressed, inputs, compress=False)[0]

    return uncompressed.collate, logits


def main(cfg):
    """Stage 1, from flags to a saved folder."""
    # 1. The data first: a bad list is an error before a large model is loaded.
    device = checkpoint.begin(cfg)
    rank, world = ranks.rank(), ranks.world()
    combinations.refuse_idle_ranks(cfg, world)
    dialogues = read_dialogues(cfg.data, Place.of(cfg), cfg.seed, cfg.turns, cfg.caption, cfg.texts)
    cfg.data_digest = checked_digest([dialogues])  # refuses unfit data; --resume compares it

    # 2. The model, and what of it is trained.
    torch.manual_seed(cfg.seed)
    embedder = load_for(cfg, device)
    # Before LoRA is added: the teacher is the model as it comes.
    teacher_collate, teacher_logits = teacher(embedder) if cfg.objective == "kl" else (None, None)
    choose_trained(embedder, cfg)
    embedder.prefixes = ()  # stage 1 trains no Matryoshka lengths, so it saves none
    optimizers = optim.make_optimizers(embedder, cfg)

    # 3. Train. Dialogues are made into model inputs in the loader's workers.
    def examples_of(step):
        def example(i):
            d = ask_first(dialogues[i], cfg, step)  # the same, without --question-first
            row = embedder.collate.row(d.item, d.turns)
            teacher_row = teacher_collate.row(d.item, d.turns) if teacher_collate else None
            return Example(row, teacher_row, d.id)

        return each(example, epoch_batch(len(dialogues), cfg, step, rank, world))

    start = checkpoint.start_or_resume(embedder, optimizers, cfg)
    ranks.say(f"{len(dialogues):,} dialogues, {cfg.batch} a step over {world} rank(s)")
    log = Log(cfg, start)
    embedder.train()
    batches = log.waiting(prefetch(examples_of, range(start, cfg.steps), cfg.workers, device))
    for step in range(start, cfg.steps):
        with checkpoint.saved_after(embedder, optimizers, cfg, step):
            examples = next(batches)
            # --------------------------------------------------------------------------------------
            lr = optim.begin_step(optimizers, step, cfg)
            loss, exact, tokens = accumulate(
                embedder, examples, cfg.chunk_tokens, cfg.compress, teacher_logits
            )
            ranks.sum_gradients(embedder.parameters())
            norm = optim.end_step(embedder, optimizers, cfg, step, loss, [x.id for x in examples])
            # --------------------------------------------------------------------------------------
            numbers = {"loss": loss, "exact": exact, "norm": norm, "lr": lr}
            numbers["cut"] = tokens_cut([x.row for x in examples])
            numbers["skipped"] = skipped_dialogues(dialogues, cfg, step)
            log(step, (tokens, "answer tokens"), numbers)

    # 4. Save. With K = 0 it is a plain instruction-tuned MLLM, and no embedder.
    checkpoint.finish(save, embedder, cfg, is_embedder=embedder.K > 0)


if __name__ == "__main__":
    ranks.run(main, Config)
