"""What follows the compression tokens knows the picture through them alone (CoMa, section 3.1)."""

import random

import pytest
import torch
from checks import close, equal, expect

import model
import pretrain
from data import ANSWER, COMPRESS, CONTENT, HEAD, IMAGE, PAD, QUESTION, Item, read_dialogues
from plumbing.errors import InputError

ROLES = ("PAD", "HEAD", "CONTENT", "COMPRESS", "QUESTION", "ANSWER")  # names, for the messages

# ---------------------------------------------------------------------------------- against loops


def oracle(roles):
    """The rule, written for one pair of tokens at a time."""
    B, L = roles.shape
    mask = torch.zeros(B, 1, L, L, dtype=torch.bool)
    for b in range(B):
        for i in range(L):
            for j in range(L):
                visible = j <= i and roles[b, j] != PAD
                if roles[b, i] in (QUESTION, ANSWER) and roles[b, j] == CONTENT:
                    visible = False
                mask[b, 0, i, j] = visible or i == j
    return mask


def dialogue_roles(rng):
    """HEAD, CONTENT, COMPRESS, then some turns; each part of a random length."""
    parts = [HEAD] * rng.randint(0, 2) + [CONTENT] * rng.randint(1, 5)
    parts += [COMPRESS] * rng.randint(0, 3)
    for _ in range(rng.randint(0, 3)):
        parts += [QUESTION] * rng.randint(1, 3) + [ANSWER] * rng.randint(1, 3)
    return parts


def layouts():
    """Batches of roles: right padding, left padding, parts in any order, nothing but padding."""
    rng = random.Random(0)
    for _ in range(10):
        rows = [dialogue_roles(rng) for _ in range(3)]
        L = max(map(len, rows))
        yield "right padding", torch.tensor([r + [PAD] * (L - len(r)) for r in rows])
        yield "left padding", torch.tensor([[PAD] * (L - len(r)) + r for r in rows])
        yield "any order", torch.tensor([rng.choices(range(6), k=9) for _ in range(3)])
    yield "only padding", torch.zeros(2, 5, dtype=torch.long)


def check_rule(compression_mask):
    for name, roles in layouts():
        before = roles.clone()
        got, want = compression_mask(roles), oracle(before)
        equal(roles, before, "the roles are read later, too: they stay as they were")
        expect(got.dtype == torch.bool, got.dtype, torch.bool, "True = may attend")
        equal(tuple(got.shape), tuple(want.shape), "one mask a row, for all heads: (B, 1, L, L)")
        wrong = (got != want).nonzero().tolist()
        where = [
            f"{ROLES[roles[b, i]]} {i} -> {ROLES[roles[b, j]]} {j}: got {not want[b, 0, i, j]}, "
            f"want {bool(want[b, 0, i, j])}"
            for b, _, i, j in wrong[:3]
        ]
        expect(not wrong, f"{name}, {len(wrong)} wrong; {'; '.join(where)}", "the loop oracle",
               "token i -> token j: may i attend to j?")  # fmt: skip
        expect(got.any(-1).all(), f"{name}: an empty row", "each token sees itself", "else NaN")


def parts(roles):
    i = torch.arange(roles.shape[1])
    self_ = i[:, None] == i[None, :]
    key = (roles != PAD)[:, None, :]
    hidden = (roles[:, :, None] > COMPRESS) & (roles[:, None, :] == CONTENT)
    return i[:, None] >= i[None, :], hidden, key, self_


def boundary_off_by_one(roles):
    causal, _, key, self_ = parts(roles)
    hidden = (roles[:, :, None] >= COMPRESS) & (roles[:, None, :] == CONTENT)
    return (causal & ~hidden & key | self_)[:, None]


def sees_the_next_token(roles):
    causal, hidden, key, self_ = parts(roles)
    return (causal.roll(1, 1).tril(1) & ~hidden & key | self_)[:, None]


def questions_only(roles):
    causal, _, key, self_ = parts(roles)
    hidden = (roles[:, :, None] == QUESTION) & (roles[:, None, :] == CONTENT)
    return (causal & ~hidden & key | self_)[:, None]


def hides_the_head(roles):
    causal, _, key, self_ = parts(roles)
    hidden = (roles[:, :, None] > COMPRESS) & (roles[:, None, :] < COMPRESS)
    return (causal & ~hidden & key | self_)[:, None]


def forgets_padding(roles):
    causal, hidden, _, _ = parts(roles)
    return (causal & ~hidden)[:, None]


def padding_sees_nothing(roles):
    causal, hidden, key, _ = parts(roles)
    return (causal & ~hidden & key)[:, None]


def test_the_mask_equals_a_loop_over_pairs_of_tokens():
    """compression_mask: causal, padding is no key, QUESTION and ANSWER never see CONTENT, the HEAD
    is seen by all, and each token sees itself; for padding on either side and any order of
    roles."""
    check_rule(pretrain.compression_mask)


@pytest.mark.parametrize(
    "wrong",
    [boundary_off_by_one, sees_the_next_token, questions_only, hides_the_head, forgets_padding]
    + [padding_sees_nothing],
)
def test_the_loop_check_fails_for_a_wrong_mask(wrong):
    """Negative control: six typical mistakes are found."""
    with pytest.raises(AssertionError):
        check_rule(wrong)


# ------------------------------------------------------------------- by influence in a real model


def talks():
    """[(item, turns)]: two dialogues of unequal length, with instruction text between the picture
    and C."""
    dialogues = [read_dialogues()[i] for i in (0, 3)]
    return [(Item(IMAGE + " look at the red circle", d.item.images), d.turns) for d in dialogues]


def inputs_of(embedder):
    items, turns = zip(*talks(), strict=True)
    return embedder.collate(items, turns)


def other_pixels(embedder, inputs):
    return {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}


def other_text(embedder, inputs):
    """Another instruction of the same length: the tokens between the picture and C change."""
    special, ids = embedder.processor.tokenizer.added_tokens_decoder, inputs["input_ids"]
    text = (inputs["roles"] == CONTENT) & ~torch.isin(ids, torch.tensor(sorted(special)))
    expect(text.any(), "no text token before C", "some", "inputs_of writes an instruction")
    return {**inputs, "input_ids": torch.where(text, (ids + 7 - 8) % 200 + 8, ids)}


def moved(embedder, inputs, change, hide):
    """How far the hidden states of (CONTENT, COMPRESS, QUESTION and ANSWER) move with the
    change."""
    with torch.no_grad():
        a, b = (hide(embedder, x) for x in (inputs, change(embedder, inputs)))
    roles = inputs["roles"]
    gaps = (a - b).abs().amax(-1)
    expect(torch.isfinite(gaps).all(), "NaN hidden states", "finite", "a row that attends nowhere?")
    return [gaps[at].max().item() for at in (roles == CONTENT, roles == COMPRESS, roles > COMPRESS)]


def cut_view_of_code(mask, roles):
    """Takes the view on C away from QUESTION and ANSWER."""
    return mask & ~((roles[:, None, :, None] > COMPRESS) & (roles[:, None, None, :] == COMPRESS))


def with_mask(compression_mask, cut):
    """hidden(inputs) under a mask function of the roles; `cut`: without the view on C."""

    def hide(embedder, inputs):
        mask = compression_mask(inputs["roles"])
        mask = cut_view_of_code(mask, inputs["roles"]) if cut else mask
        return embedder.hidden(inputs, mask)

    return hide


def causal_only(roles):
    causal, _, key, self_ = parts(roles)
    return (causal & key | self_)[:, None]


AROUND = "a path around C"  # the message of the check that negative controls must fail


def check_flow(embedder, compression_mask, hide=with_mask):
    inputs = inputs_of(embedder)
    for change in (other_pixels, other_text):
        name = change.__name__
        content, code, after = moved(embedder, inputs, change, hide(compression_mask, cut=False))
        expect(content > 1e-3 and code > 1e-3, (name, content, code), "> 1e-3", "C reads content")
        expect(after > 1e-3, (name, after), "> 1e-3", "answers read the content through C")
        _, code, after = moved(embedder, inputs, change, hide(compression_mask, cut=True))
        expect(code > 1e-3, (name, code), "> 1e-3", "the cut is behind C")
        expect(after == 0, f"{name}: {after}", "exactly 0", AROUND + ": which role, which layer?")


def test_the_content_reaches_an_answer_through_the_code_and_in_no_other_way(shared):
    """New pixels, or other words before C, change the answers' hidden states; with the view on C
    cut off as well the difference is exactly 0: there is no second path, in any layer."""
    check_flow(shared, pretrain.compression_mask)


def test_without_the_mask_the_content_goes_around_the_code(shared):
    """Negative control: plain causal attention still shows the picture when C is cut off."""
    inputs = inputs_of(shared)
    for change in (other_pixels, other_text):
        _, _, after = moved(shared, inputs, change, with_mask(causal_only, cut=True))
        expect(after > 1e-3, after, "> 1e-3", "the check would pass for any mask")
    with pytest.raises(AssertionError, match=AROUND):
        check_flow(shared, causal_only)


def test_the_flow_check_fails_for_a_mask_that_is_one_token_short(shared):
    """Negative control: a mask that leaves the last content token visible."""

    def one_short(roles):
        kept = roles.clone()
        last = (roles == CONTENT) & (roles.roll(-1, 1) != CONTENT)
        kept[last] = HEAD
        return pretrain.compression_mask(kept)

    with pytest.raises(AssertionError, match=AROUND):
        check_flow(shared, one_short)


def test_the_flow_check_fails_for_a_mask_of_the_picture_alone(shared):
    """Negative control: a mask that hides image tokens and leaves the instruction's text
    visible."""
    image = shared.mllm.config.image_token_id

    def picture_only(compression_mask, cut):
        def hide(embedder, inputs):
            is_text = (inputs["roles"] == CONTENT) & (inputs["input_ids"] != image)
            mask = compression_mask(inputs["roles"].masked_fill(is_text, HEAD))
            mask = cut_view_of_code(mask, inputs["roles"]) if cut else mask
            return embedder.hidden(inputs, mask)

        return hide

    with pytest.raises(AssertionError, match=AROUND):
        check_flow(shared, pretrain.compression_mask, picture_only)


def test_the_flow_check_fails_for_a_mask_in_the_first_layer_only(embedder):
    """Negative control: from the second layer on plain causal attention."""
    now = {}

    def hook(layer, args, kwargs):
        return args, {**kwargs, "attention_mask": now["causal"]}

    for layer in embedder.mllm.model.language_model.layers[1:]:
        layer.register_forward_pre_hook(hook, with_kwargs=True)

    def first_layer(compression_mask, cut):
        def hide(embedder, inputs):
            now["causal"] = causal_only(inputs["roles"])
            if cut:
                now["causal"] = cut_view_of_code(now["causal"], inputs["roles"])
            return with_mask(compression_mask, cut)(embedder, inputs)

        return hide

    with pytest.raises(AssertionError, match=AROUND):
        check_flow(embedder, pretrain.compression_mask, first_layer)


def test_a_kernel_that_would_ignore_the_mask_is_an_error():
    """transformers' eager attention *adds* a mask, so that a bool one would be ignored in
    silence."""
    eager = model.load("toy-random", compress_tokens=4, device="cpu", attn="eager")
    with pytest.raises(InputError, match="sdpa"):
        check_flow(eager, pretrain.compression_mask)


def test_training_uses_the_mask(shared):
    """answer_logits: under the mask with compression, plain causal attention without it, and never
    a mask where there are no compression tokens."""
    inputs = inputs_of(shared)
    at = pretrain.answer_labels(inputs["input_ids"], inputs["roles"]) != -100
    with torch.no_grad():
        hidden, seen = (
            shared.logits(shared.hidden(inputs, m))[at] for m in (oracle(inputs["roles"]), None)
        )
        for compress, want, other in ((True, hidden, seen), (False, seen, hidden)):
            got, labels = pretrain.answer_logits(shared, inputs, compress)
            close(got, want, f"compress={compress}")
            equal(len(labels), len(got), "one label for each row of logits")
            expect((got - other).abs().max() > 1e-2, "the same", "different", "is the flag read?")


def test_a_row_does_not_depend_on_the_padding_beside_it(shared):
    """Under the mask each row of a batch has the hidden states that it has alone."""
    inputs = inputs_of(shared)
    with torch.no_grad():
        h = shared.hidden(inputs, pretrain.compression_mask(inputs["roles"]))
        for b, (item, turns) in enumerate(talks()):
            one = shared.collate([item], [turns])
            alone = shared.hidden(one, pretrain.compression_mask(one["roles"]))
            close(h[b, : alone.shape[1]], alone[0], f"row {b}: padding leaks")
