"""Planted mistakes, three to eight for each exercise and more for exercise 8: test_grader.py shows
that the grader finds each. Many are those that the main tests' own negative controls use."""

import dataclasses
import functools
import math
from unittest import mock

import numpy as np
import test_answers
import test_cache
import test_evaluate
import test_losses
import test_mask
import test_pooling
import torch
import torch.nn.functional as F

import contrastive
import evaluate
import pretrain
from data import ANSWER, COMPRESS, CONTENT, QUESTION
from exercises import ladder
from exercises.two_ranks import WRONG
from tools import mask_as_cache

OURS = ladder.subject(None)

# The originals, under a mistake too: `planted` does not reach into this file.
info_nce = contrastive.info_nce
compression_mask = pretrain.compression_mask
our_labels = pretrain.answer_labels
two_passes = contrastive.two_passes
precision_at_1 = evaluate.precision_at_1
flip_one_bit = OURS.flip_one_bit
layout = OURS.layout
info_nce_gradient = OURS.info_nce_gradient
hardness_gradient = OURS.hardness_gradient
matryoshka_loss = OURS.matryoshka_loss


class Wrong:
    """The reference with one thing changed."""

    def __init__(self, **changed):
        vars(self).update(changed)

    def __getattr__(self, name):
        return getattr(OURS, name)


# --------------------------------------------------------------------------------------- exercise 0


def flips_in_place(mask, row, column):
    mask[0, 0, row, column] ^= True
    return mask


def flips_the_mirrored_bit(mask, row, column):
    return flip_one_bit(mask, column, row)


def opens_the_whole_row(mask, row, column):
    mask = mask.clone()
    mask[0, 0, row] = True
    return mask


def returns_nothing(mask, row, column):
    flip_one_bit(mask, row, column)


# --------------------------------------------------------------------------------------- exercise 1


def overflows(q, t, temperature, labels=None, keys=None):
    """The formula as it is written: e^100 is too large for float32."""
    labels = torch.arange(len(q)) if labels is None else labels
    keys = torch.arange(len(t)) if keys is None else keys
    own = torch.arange(len(t))[None] == labels[:, None]
    kept = own | (keys[None] != keys[labels][:, None])
    e = (q @ t.T / temperature).exp() * kept
    loss = -(e[own] / e.sum(1)).log().mean()
    return loss, (e[own] > (e * ~own).amax(1)).double().mean()


def forgets_keys(q, t, temperature, labels=None, keys=None):
    return info_nce(q, t, temperature, labels)


def hits_without_keys(q, t, temperature, labels=None, keys=None):
    loss, _ = info_nce(q, t, temperature, labels, keys)
    return loss, info_nce(q, t, temperature, labels)[1]


def sums(q, t, temperature, labels=None, keys=None):
    loss, hits = info_nce(q, t, temperature, labels, keys)
    return loss * len(q), hits


def a_tie_is_a_hit(q, t, temperature, labels=None, keys=None):
    loss, _ = info_nce(q, t, temperature, labels, keys)
    labels = torch.arange(len(q)) if labels is None else labels
    return loss, ((q @ t.T).argmax(1) == labels).double().mean()


def the_loss_alone(q, t, temperature, labels=None, keys=None):
    return info_nce(q, t, temperature, labels, keys)[0]


def keys_in_the_queries_order(q, t, temperature, labels=None, keys=None):
    """keys[:B] for keys[labels]: the same where query i's target is column i."""
    if keys is None:
        return info_nce(q, t, temperature, labels)
    labels = torch.arange(len(q)) if labels is None else labels
    own = torch.arange(len(t))[None] == labels[:, None]
    scores = q @ t.T / temperature
    scores = scores.masked_fill((keys[None] == keys[: len(q), None]) & ~own, -math.inf)
    hits = scores[own] > scores.masked_fill(own, -math.inf).amax(1)
    return F.cross_entropy(scores, labels), hits.double().mean()


# --------------------------------------------------------------------------------------- exercise 2


def roles_in_place(roles):
    """A right mask, and answers are questions from now on."""
    mask = compression_mask(roles)
    roles[roles == ANSWER] = QUESTION
    return mask


# --------------------------------------------------------------------------------------- exercise 3


def labels_in_place(input_ids, roles):
    """Right labels, and the model's input is spoilt."""
    labels = our_labels(input_ids.clone(), roles)
    input_ids[roles != ANSWER] = -100
    return labels


def wraps_round(input_ids, roles):
    """The last position gets the label of the row's first token."""
    return test_answers.unshifted(input_ids, roles).roll(-1, 1)


# --------------------------------------------------------------------------------------- exercise 5


def one_graph(embed, chunks, loss_of):
    """The right gradient from all graphs at once: nothing is saved."""
    parts = {}
    for chunk in chunks:
        parts.update(zip(chunk, embed(chunk), strict=True))
    loss = loss_of(torch.stack([parts[i] for i in range(len(parts))]))
    loss.backward()
    return loss.detach()


def no_replay(embed, chunks, loss_of):
    """Ours, with a second pass whose dropout falls anew."""
    numbers = torch.Generator().manual_seed(7)

    def embed_anew(chunk):
        if torch.is_grad_enabled():
            torch.manual_seed(int(torch.randint(10**6, (1,), generator=numbers)))
        return embed(chunk)

    return two_passes(embed_anew, chunks, loss_of)


def each_chunk_alone(embed, chunks, loss_of):
    """The mean of the chunks' own losses: the small batch that GradCache is there to avoid."""
    total = 0.0
    for chunk in chunks:
        part = embed(chunk)
        z = part.new_zeros(sum(map(len, chunks)), part.shape[1])
        z[chunk] = part
        loss = loss_of(z) / len(chunks)
        loss.backward()
        total += loss.item()
    return total


def wrong_order(embed, chunks, loss_of):
    """The loss sees the rows in the order of the chunks."""
    order, straight = [], []
    for chunk in chunks:
        straight.append(list(range(len(order), len(order) + len(chunk))))
        order += chunk
    return two_passes(lambda chunk: embed([order[i] for i in chunk]), straight, loss_of)


def loss_with_a_graph(embed, chunks, loss_of):
    return torch.tensor(float(two_passes(embed, chunks, loss_of)), requires_grad=True)


# --------------------------------------------------------------------------------------- exercise 7


def zero_for_nan(q, c, candidates, tie=1e-6):
    """No hit beside a rival; without one a hit."""
    return precision_at_1(np.nan_to_num(q), c, candidates, tie)


def max_of_nan(q, c, candidates, tie=1e-6):
    """`max` keeps what it has where it meets NaN: a hit beside a rival that is none."""
    hits = []
    for x, rows in zip(q, candidates, strict=True):
        scores = c[rows] @ x
        others = [s for s, row in zip(scores, rows, strict=True) if row != rows[0]]
        hits.append(scores[0] > max(others, default=-math.inf) + tie)
    return float(np.mean(hits))


def no_hit_without_a_rival(q, c, candidates, tie=1e-6):
    hits = []
    for i, rows in enumerate(candidates):
        rivals = set(rows) - {rows[0]}
        hits.append(bool(rivals) and precision_at_1(q[i : i + 1], c, [rows], tie))
    return float(np.mean(hits))


# --------------------------------------------------------------------------------------- exercise 8

VALUES = {
    "loss of a collapsed model": (math.log2(64), 0.0, math.log(64) / 0.03),
    "loss with hard negatives": (math.log(64), math.log(65)),
    "loss with equal targets": (math.log(4), math.log(2)),
    "argmax of a collapsed model": (10.0, 0.0),
    "precision of a collapsed model": (100.0, 10.0),
    "keys of a question token": (11, 4, 6),
    "labels of a row": (3, 1, 14),
    "forward passes": (16, 8, 11),
    "factor of a mean over ranks": (1.0, 4.0),
    "mean of means": (1.0, 0.7),
}


def wrong_predictions():
    """Two or three wrong answers to each question, one at a time."""
    wrong = {}
    for question, values in VALUES.items():
        for value in values:
            predictions = {**OURS.PREDICTIONS, question: value}
            wrong[f"{question} {value:.4g}"] = Wrong(PREDICTIONS=predictions)
    return {**wrong, "no answers": Wrong(PREDICTIONS={})}


# ---------------------------------------------------------------------------------- exercises 6, 9


def in_a_rank(name):
    """Exercise 6 runs in processes of its own: there the mistake is a name in a file."""
    return Wrong(SUBJECT=name)


def bug(name, test):
    """Exercise 9: one wrong test's name."""
    return Wrong(BUGS={**OURS.BUGS, name: test})


# -------------------------------------------------------------------------------------- exercise 10


def table(**changed):
    return Wrong(ABLATION={**OURS.ABLATION, **changed})


def arms_with(change):
    """The table with change(arm) in place of each arm."""
    arms = {name: {**arm, **change(arm)} for name, arm in OURS.ABLATION["arms"].items()}
    return table(arms=arms)


def two_seeds(arm):
    return {"scores": {seed: arm["scores"][seed] for seed in (0, 1)}}


def deviation_for_error(arm):
    return {"se": arm["se"] * 3**0.5}


# -------------------------------------------------------------------------------------- exercise 11


def ends_twice(template, content, code, turns):
    """The end-of-turn token of the answer, and that of the next turn's beginning once more."""
    twice = dataclasses.replace(template, turn_ids=template.end_ids + template.turn_ids)
    return layout(twice, content, code, turns)


def own_turn_without_a_code(template, content, code, turns):
    """K = 0 laid out as if there were a code, of no tokens."""
    parts = layout(template, content, code or ["C"], turns)
    return [part for part in parts if code or part[0] != COMPRESS]


def never_learns_to_stop(template, content, code, turns):
    """The end-of-turn token counts as the next question's, and the last answer has none."""
    return layout(dataclasses.replace(template, end_ids=[]), content, code, turns)


def code_after_the_question(template, content, code, turns):
    """The code has read the question: it need not foresee anything."""
    parts = layout(template, content, code, turns)
    rest = [part for part in parts if part[0] != COMPRESS]
    roles = [role for role, _ in rest]
    at = roles.index(ANSWER) if turns else len(rest)
    return [*rest[:at], (COMPRESS, code), *rest[at:]]


def one_list_of_ids(template, content, code, turns):
    return [token for _, ids in layout(template, content, code, turns) for token in ids]


def opens_each_turn_like_the_first(template, content, code, turns):
    """Some templates write more between two turns than before the first one."""
    again = dataclasses.replace(template, turn_ids=template.end_ids + template.head_ids)
    return layout(again, content, code, turns)


def changes_the_content(template, content, code, turns):
    """Right rows, and without a code the first question is in the content from now on."""
    parts = layout(template, content, code, turns)
    if turns and not code:
        content += turns[0][0]
    return parts


def changes_the_template(template, content, code, turns):
    """Right rows, and `turn_ids += question` on the way."""
    parts = layout(template, content, code, turns)
    for question, _ in turns:
        template.turn_ids += question
    return parts


# -------------------------------------------------------------------------------------- exercise 12


def with_the_cache_of(change):
    """The reference with change(cache, roles) in the place of what throws the picture away."""

    def hidden_through_cache(*arguments):
        with mock.patch.object(mask_as_cache, "without_content", change):
            return mask_as_cache.hidden_through_cache(*arguments)

    hidden_through_cache.__name__ = change.__name__
    return hidden_through_cache


def closes_the_gap(run, tokens, positions, roles):
    """Positions that go on where the shorter cache ends."""
    gone = int((roles == CONTENT).sum())

    def closer(tokens, positions, cache):
        return run(tokens, positions - (0 if cache is None else gone), cache)

    return mask_as_cache.hidden_through_cache(closer, tokens, positions, roles)


# -------------------------------------------------------------------------------------- exercise 13


def forgets_the_temperature(cosines, temperature, labels=None, keys=None):
    return info_nce_gradient(cosines, temperature, labels, keys) * temperature


def of_the_sum(cosines, temperature, labels=None, keys=None):
    return info_nce_gradient(cosines, temperature, labels, keys) * len(cosines)


def pulls_the_diagonal(cosines, temperature, labels=None, keys=None):
    return info_nce_gradient(cosines, temperature, None, keys)


def pushes_equal_targets_away(cosines, temperature, labels=None, keys=None):
    return info_nce_gradient(cosines, temperature, labels)


def exp_without_a_shift(cosines, temperature, labels=None, keys=None):
    """The softmax as it is written."""
    labels = torch.arange(len(cosines)) if labels is None else labels
    keys = torch.arange(cosines.shape[1]) if keys is None else keys
    own = torch.arange(cosines.shape[1])[None] == labels[:, None]
    e = (cosines / temperature).exp() * (own | (keys[None] != keys[labels][:, None]))
    return (e / e.sum(1, keepdim=True) - own.to(e)) / temperature / len(cosines)


# -------------------------------------------------------------------------------------- exercise 14


def differentiates_the_weight(cosines, temperature, alpha, labels=None):
    """A negative's push gets (1 / tau + alpha) in the place of 1 / tau."""
    reweigh = functools.partial(test_losses.weights_that_learn, hardness=alpha)
    return ladder.gradient_of_ours(cosines, temperature, labels, reweigh=reweigh)


def weighs_the_positive_too(cosines, temperature, alpha, labels=None):
    """e^(c / tau + alpha c) in every column: another temperature, and no more."""
    colder = 1 / (1 / temperature + alpha)
    return info_nce_gradient(cosines, colder, labels) * colder / temperature


def weighs_the_gradient(cosines, temperature, alpha, labels=None):
    """The weight behind the softmax, not in it: the pull is not what is pushed."""
    gradient = info_nce_gradient(cosines, temperature, labels)
    return gradient * torch.where(gradient > 0, (alpha * cosines).exp(), 1.0)


def has_no_temperature(cosines, temperature, alpha, labels=None):
    return hardness_gradient(cosines, temperature, alpha, labels) * temperature


def sums_over_queries(cosines, temperature, alpha, labels=None):
    return hardness_gradient(cosines, temperature, alpha, labels) * len(cosines)


def weights_times_exp(cosines, temperature, alpha, labels=None):
    """The formula as it is written, without logarithms."""
    labels = torch.arange(len(cosines)) if labels is None else labels
    own = torch.arange(cosines.shape[1])[None] == labels[:, None]
    weights = torch.where(own, 1.0, (alpha * cosines).exp())
    e = weights * (cosines / temperature).exp()
    return (e / e.sum(1, keepdim=True) - own.to(e)) / temperature / len(cosines)


# -------------------------------------------------------------------------------------- exercise 15


def mean_over(parts_of):
    """The mean of the loss over parts_of(q or t, lengths)."""

    def matryoshka_loss(loss, q, t, lengths):
        parts = zip(parts_of(q, lengths), parts_of(t, lengths), strict=True)
        return torch.stack([loss(*part) for part in parts]).mean()

    matryoshka_loss.__name__ = parts_of.__name__
    return matryoshka_loss


def prefixes_as_they_are(x, lengths):
    return [x, *(x[:, :n] for n in lengths)]


def suffixes(x, lengths):
    return [x, *(F.normalize(x[:, -n:], dim=1) for n in lengths)]


def columns_of_unit_length(x, lengths):
    return [x, *(F.normalize(x[:, :n], dim=0) for n in lengths)]


def without_the_whole(x, lengths):
    return [F.normalize(x[:, :n], dim=1) for n in lengths] or [x]


def sums_over_prefixes(loss, q, t, lengths):
    return matryoshka_loss(loss, q, t, lengths) * (1 + len(lengths))


def prefixes_that_teach_nothing(loss, q, t, lengths):
    """The right number, without the prefixes' gradient."""
    whole = loss(q, t) / (1 + len(lengths))
    with torch.no_grad():
        rest = matryoshka_loss(loss, q, t, lengths) - whole
    return whole + rest


# ---------------------------------------------------------------------------------------- all of it


def replacing(name, *functions):
    """{the mistake's name: the reference with a wrong function in the place of `name`}."""
    return {f.__name__: Wrong(**{name: f}) for f in functions}


def mistakes(exercise) -> dict:
    """{the mistake's name: what is graded in the student's place}."""
    return ALL[exercise]()


ALL = {
    "ex0": lambda: {
        **replacing("flip_one_bit", flips_in_place, flips_the_mirrored_bit, opens_the_whole_row),
        **replacing("flip_one_bit", returns_nothing),
        "a_bit_of_the_code": Wrong(FLIP=(37, 21)),
        "not_two_numbers": Wrong(FLIP=37),
    },
    "ex1": lambda: replacing(
        "info_nce",
        overflows,
        forgets_keys,
        hits_without_keys,
        sums,
        a_tie_is_a_hit,
        keys_in_the_queries_order,
        the_loss_alone,
    ),
    "ex2": lambda: replacing(
        "compression_mask",
        test_mask.boundary_off_by_one,
        test_mask.sees_the_next_token,
        test_mask.questions_only,
        test_mask.padding_sees_nothing,
        roles_in_place,
    ),
    "ex3": lambda: {
        **replacing("answer_labels", test_answers.unshifted, test_answers.with_questions),
        **replacing("answer_labels", labels_in_place, wraps_round),
        "mean": Wrong(answer_loss=F.cross_entropy),
    },
    "ex4": lambda: replacing(
        "compression_pool", test_pooling.at_the_end, test_pooling.by_length, test_pooling.all_tokens
    ),
    "ex5": lambda: replacing(
        "two_passes", one_graph, no_replay, each_chunk_alone, wrong_order, loss_with_a_graph
    ),
    "ex6": lambda: {name: in_a_rank(name) for name in WRONG},
    "ex7": lambda: {
        **replacing("precision_at_1", test_evaluate.argmax, test_evaluate.all_rows, zero_for_nan),
        **replacing("precision_at_1", max_of_nan, no_hit_without_a_rival),
        "no_margin": Wrong(precision_at_1=functools.partial(precision_at_1, tie=0)),
    },
    "ex8": wrong_predictions,
    "ex9": lambda: {
        "another_bugs_test": bug("b1", OURS.BUGS["b5"]),
        "no_such_test": bug("b3", "test_answers.py::test_nothing_at_all"),
        "not_named": bug("b5", ""),
        "no_table": Wrong(BUGS={}),
    },
    "ex10": lambda: {
        "two_seeds": arms_with(two_seeds),
        "deviation_for_error": arms_with(deviation_for_error),
        "wrong_sign": table(difference=-9.0),
        "too_bold": table(conclusion="lower"),
    },
    "ex11": lambda: replacing(
        "layout",
        ends_twice,
        own_turn_without_a_code,
        never_learns_to_stop,
        code_after_the_question,
        opens_each_turn_like_the_first,
        changes_the_template,
        changes_the_content,
        one_list_of_ids,
    ),
    "ex12": lambda: replacing(
        "hidden_through_cache",
        with_the_cache_of(test_cache.keeps_the_picture),
        with_the_cache_of(test_cache.keeps_the_code_alone),
        with_the_cache_of(test_cache.is_cut_from_its_graph),
        closes_the_gap,
    ),
    "ex13": lambda: replacing(
        "info_nce_gradient",
        forgets_the_temperature,
        of_the_sum,
        pulls_the_diagonal,
        pushes_equal_targets_away,
        exp_without_a_shift,
    ),
    "ex14": lambda: replacing(
        "hardness_gradient",
        differentiates_the_weight,
        weighs_the_positive_too,
        weighs_the_gradient,
        has_no_temperature,
        sums_over_queries,
        weights_times_exp,
    ),
    "ex15": lambda: replacing(
        "matryoshka_loss",
        mean_over(prefixes_as_they_are),
        mean_over(suffixes),
        mean_over(columns_of_unit_length),
        mean_over(without_the_whole),
        sums_over_prefixes,
        prefixes_that_teach_nothing,
    ),
}
