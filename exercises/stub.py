"""Your file. Sixteen exercises; exercises/README.md says what each needs and how long it takes.

    python -m pytest -q -x --tb=short -m ex1 exercises    grades exercise 1, in your copy

You may import torch, numpy, math and data (the roles of tokens). Not model, pretrain, contrastive,
evaluate, plumbing and tools: the solutions stand there.

Letters: B rows of a batch, or queries; M targets; L tokens of a row; K of them the code; D width;
V words of the vocabulary. F is torch.nn.functional, dist torch.distributed."""

import numpy as np  # noqa: F401
import torch  # noqa: F401
import torch.distributed as dist  # noqa: F401
import torch.nn.functional as F  # noqa: F401

from data import ANSWER, COMPRESS, CONTENT, HEAD, PAD, QUESTION  # noqa: F401

# ---------------------------------------------------------------------------- Exercise 0: one bit

# Run `python -m tools.explain pretrain`. Its part 2 says which token stands at which position, its
# part 3 draws the mask: the row attends to the column where there is a #. Choose a "." in the row
# of an answer's token and in the column of a token of the picture: (row, column), counted from 0.
FLIP = None


def flip_one_bit(mask, row, column):
    """CoMa, section 3.1: an answer knows the picture through the compression tokens alone. One
    wrong bit of the mask is enough to break that; would anybody notice?

    mask bool (1, 1, L, L), that of one dialogue: True at [0, 0, i, j] where token i may attend to
    token j -> a *new* mask with the bit at this row and column turned round; `mask` stays as it is.
    Roughly 3 lines."""
    raise NotImplementedError("Exercise 0: one bit; grade with pytest -m ex0")


# ---------------------------------------------------------------------------- Exercise 1: InfoNCE


def info_nce(q, t, temperature, labels=None, keys=None):
    """VLM2Vec, Eq. (1): each query picks its own target among all targets of the batch, by a
    softmax over cosines divided by the temperature. The loss is how surprised it is by the truth.

    q (B, D), t (M, D), unit length; labels (B,): the column of query i's target (None: i); keys
    (M,): a column with the same key as query i's target is the same thing once more, so it is no
    negative of query i; the target itself stays (None: all columns differ).
    -> (loss: mean nats, a scalar; hits: share of queries whose target scores higher than every
    negative; equal is not higher).

    The rows are of unit length already: dividing by it again would change the gradient.

    Slowly, for query i with target p:
        scores = q[i] . t[j] / temperature, for each column j that is p or has another key than p
        loss_i = log(sum of e^score) - score of p
    e^(1 / 0.01) does not fit into float32: PyTorch has what you need.
    Roughly 8 lines; 4 without keys and hits."""
    raise NotImplementedError("Exercise 1: InfoNCE; grade with pytest -m ex1")


# ------------------------------------------------------------------- Exercise 2: compression mask


def compression_mask(roles):
    """CoMa, section 3.1: attention stays causal, with one change. Questions and answers do not see
    the picture and its text; they know them through the compression tokens alone.

    roles (B, L), integers: PAD 0, HEAD 1, CONTENT 2, COMPRESS 3, QUESTION 4, ANSWER 5.
    -> bool (B, 1, L, L); True at [b, 0, i, j]: token i of row b may attend to token j.

    Slowly: i may attend to j if
        j does not come after i, and j is no padding,
        and not (i is a question's or an answer's token, and j is content).
    Besides, every token may attend to itself: a row without any True becomes NaN in the softmax.
    Roughly 5 lines, no loop."""
    raise NotImplementedError("Exercise 2: compression mask; grade with pytest -m ex2")


# ---------------------------------------------------------------------- Exercise 3: answer labels


def answer_labels(input_ids, roles):
    """CoMa, section 3.1: the loss is on the answers, P(A | C, Q), and on nothing else.

    input_ids (B, L), roles (B, L) -> labels (B, L), integers: what position i must predict.

    Slowly: labels[b, i] is the id of the *next* token if that token belongs to an answer; else, and
    at the last position, -100. Roughly 3 lines, no loop."""
    raise NotImplementedError("Exercise 3: answer labels; grade with pytest -m ex3")


def answer_loss(logits, labels):
    """The cross-entropy of n answer tokens: their *sum*, in nats (why a sum? Think of two chunks,
    one with 2 answer tokens and one with 20).

    logits (n, V), labels (n,), no -100 among them -> a scalar.
    Slowly: add up -log of the softmax of logits[k] at labels[k]. Roughly 1 line."""
    raise NotImplementedError("Exercise 3: answer loss; grade with pytest -m ex3")


# ---------------------------------------------------------------------------- Exercise 4: pooling


def compression_pool(h, attention_mask, K):
    """CoMa, section 3.2: an embedding is the mean of the K compression tokens' last hidden states;
    they are the last K real tokens of a row. (VLM2Vec takes the last token: K = 1.)

    h (B, L, D), attention_mask (B, L), 1 at real tokens and 0 at padding; K or more are real in
    each row. The padding stands on the right in some batches and on the left in others -> (B, D).

    Slowly, for one row: collect the h of its real tokens, in order; average the last K of them.
    Roughly 4 lines, no loop over rows."""
    raise NotImplementedError("Exercise 4: pooling; grade with pytest -m ex4")


# -------------------------------------------------------------------------- Exercise 5: GradCache


def two_passes(embed, chunks, loss_of):
    """GradCache (arXiv 2101.06983, section 3): the loss needs all embeddings at once, the graph of
    all of them does not fit. So the chain rule is cut in two at the embeddings z.

    embed(chunk, a list of n row numbers) -> (n, D): a model, with dropout in it; chunks: a list of
    such lists, each row in one of them; loss_of(z (rows, D), in the order of their numbers) -> a
    scalar. Leaves in `.grad` of the model's parameters what `loss.backward()` on the whole batch
    would have added there. -> the loss, without a graph.

    Slowly:
        first pass: embed each chunk without a graph; remember the random state *before* each
        between:    the loss of all z, and its gradient with respect to z
        second pass: for each chunk, embed it again, with a graph and the *same* random numbers;
                    push its part of the gradient through that graph; let the graph go
    One graph is alive at a time. The next random number after the step is the one that would have
    followed the first pass. Call embed for nothing else: what it gave for a chunk says how large D
    is. Look up torch.get_rng_state and torch.random.fork_rng. Roughly 14 lines."""
    raise NotImplementedError("Exercise 5: GradCache; grade with pytest -m ex5")


# -------------------------------------------------------------------------- Exercise 6: two ranks


def gather_rows(x, counts):
    """VLM2Vec, section 3: each rank embeds its own share, and its queries see the targets of all.

    x (counts[rank], D): this rank's rows; counts: how many rows each rank has, not all the same.
    -> (sum of counts, D): all ranks' rows, in the order of ranks, on every rank.

    Needs no gradient; it is called between GradCache's passes. With one rank (len(counts) == 1)
    there is no process group: return the rows as they are. torch.distributed.all_gather wants
    tensors of one size: pad, gather, cut. Roughly 6 lines."""
    raise NotImplementedError("Exercise 6: gather; grade with pytest -m ex6")


def scatter_sum(grad, counts):
    """The way back. Every rank has a gradient for *all* targets, for its queries saw them all; the
    gradient of a target is the sum over the ranks.

    grad (sum of counts, D), on each rank another one -> (counts[rank], D): the sum over ranks of
    the rows that are this rank's. With one rank it is grad itself. Leave `grad` unchanged.
    Slowly: on rank r, add up every rank's grad[rows of r]. Roughly 4 lines."""
    raise NotImplementedError("Exercise 6: scatter; grade with pytest -m ex6")


# ------------------------------------------------------------------------ Exercise 7: Precision@1


def precision_at_1(q, c, candidates, tie=1e-6):
    """VLM2Vec, MMEB's measure: the share of queries whose right candidate comes first.

    NumPy arrays q (n, D), c (m, D), unit length; candidates[i]: the rows of c among which query i
    chooses, the right one *first* -> a float from 0 to 1.

    Slowly: query i is a hit if the cosine of its right candidate is greater than each other
    candidate's by more than `tie`. So a tie is no hit, and NaN, in whatever place, is no hit
    either. The right one's row listed twice is no rival of itself; without any rival all but NaN is
    a hit. Roughly 6 lines; a loop over queries is fine."""
    raise NotImplementedError("Exercise 7: Precision@1; grade with pytest -m ex7")


# ------------------------------------------------------------------ Exercise 8: predict, then run

# A number for each question. First on paper, without running anything; then run what you doubt.
PREDICTIONS = {
    # The model has collapsed: all embeddings are equal. InfoNCE's loss in nats (2 decimals), with
    # 64 pairs and temperature 0.03?
    "loss of a collapsed model": None,
    # The same, with temperature 0.02, and one hard negative for each query, all of them in the
    # common pool of targets?
    "loss with hard negatives": None,
    # 4 pairs, collapsed. Targets 0 and 1 are the same text, 2 and 3 another one; equal targets are
    # no negatives of each other. Loss in nats (2 decimals)?
    "loss with equal targets": None,
    # Collapsed, 10 candidates a query, the right one at index 0. Precision@1 in percent if the code
    # says `np.argmax(scores) == 0`?
    "argmax of a collapsed model": None,
    # And with a tie counted as no hit, in percent?
    "precision of a collapsed model": None,
    # One row: 1 HEAD, 6 CONTENT, 2 COMPRESS, 3 QUESTION, 2 ANSWER tokens. How many tokens does the
    # second question token attend to, itself included?
    "keys of a question token": None,
    # The same row. How many of its positions have a label other than -100?
    "labels of a row": None,
    # GradCache over 8 chunks of equal size; the last 3 keep the graph of their first pass. How many
    # forward passes of a chunk are there in one step, all chunks together?
    "forward passes": None,
    # 4 ranks. Each gathers all embeddings and puts its own slice back, so that only its own slice
    # has a graph; each computes the mean loss over all queries; DDP takes the *mean* of the ranks'
    # gradients. By what factor is the result the true gradient?
    "factor of a mean over ranks": None,
    # Two chunks: 2 answer tokens at 3 nats each, 8 answer tokens at 1 nat each. Mean of the chunks'
    # means, divided by the mean over tokens (2 decimals)?
    "mean of means": None,
}

# --------------------------------------------------------------------------- Exercise 9: bug hunt

# For each bug of exercises/README.md the test that catches it, "test_file.py::test_name": it passes
# on our code and fails where the bug is planted. `python -m exercises.bugs b1 tests/test_mask.py`
# runs tests with bug b1 planted.
BUGS = {
    "b1": "",
    "b2": "",
    "b3": "",
    "b4": "",
    "b5": "",
    "b6": "",
    "b7": "",
    "b8": "",
    "b9": "",
}  # fmt: skip

# -------------------------------------------------------------------------- Exercise 10: ablation

# exercises/README.md shows the form: two arms, at least three seeds each, means and their standard
# errors.
ABLATION = None

# ------------------------------------------------------------------------- Exercise 11: the layout


def layout(template, content, code, turns):
    """CoMa, section 3.1: a row of stage 1 is [picture] C_1 ... C_K Q_1 A_1 Q_2 A_2 ... In what
    order do its tokens stand, with what the chat template writes between them, and in which role?

    All pieces are lists of token ids. content: the picture and its text; code: C_1 ... C_K, or []
    (K = 0: plain instruction tuning); turns: [(question, answer), ...]. The template's pieces:
        template.head_ids      open the first user turn
        template.answer_ids    close a user turn, open the assistant's
        template.end_ids       close an assistant turn
        template.turn_ids      close an assistant turn (they begin with end_ids), open a user turn
    -> [(role, ids), ...]; a role is HEAD ... ANSWER, the numbers imported above. What has one role
    may stand in one pair or in several.

    Slowly, with a code: to the model the code is the assistant's answer to the content.
        HEAD      head_ids
        CONTENT   content, and answer_ids
        COMPRESS  code
        for each turn:
            QUESTION  turn_ids, the question, answer_ids
            ANSWER    the answer, end_ids: the model must learn to stop
    Each turn is closed once: after an answer, which has brought its end_ids, turn_ids go without
    theirs. Without a code, where there is at least one turn, content and first question share one
    user turn: neither answer_ids behind the content nor turn_ids before that question; everything
    else stays.
    Leave the lists that you are given as they are. Roughly 12 lines."""
    raise NotImplementedError("Exercise 11: the layout; grade with pytest -m ex11")


# ---------------------------------------------------------------- Exercise 12: the mask as a cache


def hidden_through_cache(run, tokens, positions, roles):
    """CoMa, section 3.1, without a mask. Run what stands before the questions, throw the picture's
    keys and values away, and run questions and answers behind what is left: they know the picture
    through C alone. What is left *is* the embedding's material, and all that must be stored.

    tokens (L,), positions (..., L), roles (L,): one row, not padded, [HEAD, CONTENT, COMPRESS,
    QUESTION, ANSWER, ...] in this order. run is a causal transformer:
        run(tokens (n,), positions (..., n), cache) -> (hidden states (n, D), a new cache)
    cache: None, or a list with one (keys, values) for each layer, both (..., so many tokens, d).
    These tokens attend to all of the cache and, causally, to each other; the new cache is the old
    one with their keys and values behind it.
    -> hidden states (L, D) of all tokens, in the row's order, as the mask would give them, with a
    gradient that reaches C.

    Slowly:
        run head, content and code without a cache
        of each layer's keys and values keep those of tokens that are no content
        run the rest behind them, at the positions that it has in the whole row
    Each token runs once, in two calls; where there is no question, one is enough. Roughly 6
    lines."""
    raise NotImplementedError("Exercise 12: the mask as a cache; grade with pytest -m ex12")


# ------------------------------------------------------------- Exercise 13: InfoNCE's gradient


def info_nce_gradient(cosines, temperature, labels=None, keys=None):
    """VLM2Vec, Eq. (1), by hand: how much does the loss of exercise 1 change with each cosine? This
    is all that the embeddings are told, and what GradCache keeps between its passes comes from it.

    cosines (B, M) of the queries with all targets; temperature, labels (B,), keys (M,) as in
    exercise 1 -> (B, M): the gradient of the *mean* loss with respect to each cosine. It is called
    in inference mode, where autograd cannot help. Leave `cosines` as they are.

    On paper, for one query with target p: loss = log(sum over j of e^(c_j / tau)) - c_p / tau.
    What is its derivative by c_j? By c_p? What stands between it and a softmax? What of a column
    that has the key of the target, and is not the target?
    Temperature 0.005 must not overflow: PyTorch has what you need. Roughly 7 lines, no loop."""
    raise NotImplementedError("Exercise 13: InfoNCE's gradient; grade with pytest -m ex13")


# ------------------------------------------------------------------------- Exercise 14: hardness


def hardness_gradient(cosines, temperature, alpha, labels=None):
    """LLaVE (arXiv 2503.04812): a negative that is near its query should be pushed away harder than
    the softmax does by itself. Each negative j of query i gets a weight
        w_ij = e^(alpha * c_ij),  c the cosine,
    and the loss of query i with target p is
        -log( e^(c_ip / tau) / (e^(c_ip / tau) + sum over j other than p of w_ij e^(c_ij / tau)) ).
    The weight is a number that is read off the model: *no gradient goes through it*.

    cosines (B, M), temperature, labels (B,) as in exercise 13; alpha 0: exercise 13 without keys
    -> (B, M): the gradient of the *mean* loss with respect to each cosine. It is called in
    inference mode, where autograd cannot help. Leave `cosines` as they are.

    On paper: what is the derivative if w is a constant? Of what numbers is it a softmax now?
    Temperature 0.005 must not overflow: what is the logarithm of w e^(c / tau)? Roughly 7 lines, no
    loop."""
    raise NotImplementedError("Exercise 14: hardness; grade with pytest -m ex14")


# ----------------------------------------------------------------------- Exercise 15: Matryoshka


def matryoshka_loss(loss, q, t, lengths):
    """Matryoshka representation learning (arXiv 2205.13147, Eq. (1), all weights equal): the first
    n numbers of an embedding are to be an embedding, too, for an index of n / D the size. So they
    are trained as one: a doll inside of a doll.

    q (B, D), t (M, D), unit length; loss(q' (B, n), t' (M, n), rows of unit length) -> a scalar,
    exercise 1's loss for example, at some temperature and without its hits; lengths: [n, ...], each
    below D, or []
    -> a scalar, with a gradient that reaches q and t: the mean of 1 + len(lengths) losses,

        ( loss(q, t) + sum over n of loss(first n of q, first n of t) ) / (1 + len(lengths))

    where the first n numbers of a unit vector are no unit vector: each row is divided by its own
    length again. Roughly 5 lines."""
    raise NotImplementedError("Exercise 15: Matryoshka; grade with pytest -m ex15")
