"""The compression mask is a cache without the picture: run [head, picture, C], throw the picture's
keys and values away, run questions and answers behind the rest. No line is shared with
`compression_mask`, and no mask is in it (tools/mask_as_cache.py)."""

import families
import pytest
import torch
from checks import close, expect
from PIL import Image

import model
import pretrain
from data import COMPRESS, CONTENT, IMAGE, Item
from plumbing.families import position_ids
from tools import mask_as_cache

TURNS = (("What is on the left?", "a red circle"), ("How many objects?", "two"))
FAMILIES = ("qwen2_5_vl", "llava_next")  # M-RoPE in three dimensions; plain positions, and tiles


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A tiny random model of one family, K = 3."""
    folder = families.build(request.param, tmp_path_factory.mktemp(request.param))
    return model.load(folder, 3, "mean", "chat", "cpu").eval()


def row_of(embedder):
    """One row: head, a picture with an instruction, C, two questions with their answers."""
    noise = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.to(torch.uint8).numpy()).resize((64, 64), Image.NEAREST)
    return embedder.collate([Item(IMAGE + " look at the circle", (picture,))], [TURNS])


def by_mask(embedder, inputs):
    """Hidden states (L, D) as training has them."""
    return embedder.hidden(inputs, pretrain.compression_mask(inputs["roles"]))[0]


def by_cache(embedder, inputs, through=mask_as_cache.hidden_through_cache, watch=lambda run: run):
    """Hidden states (L, D) from the cache; watch: puts something around `run`."""
    run = watch(mask_as_cache.runner(embedder, inputs))
    positions = position_ids(embedder.mllm, inputs, False)[..., 0, :]
    return through(run, inputs["input_ids"][0], positions, inputs["roles"][0])


def gradients(embedder, inputs, hidden):
    """{name: gradient} of the answers' loss by this way to hidden states; of all parameters."""
    embedder.zero_grad(set_to_none=True)
    labels = pretrain.answer_labels(inputs["input_ids"], inputs["roles"])[0]  # (L,)
    is_label = labels != -100
    logits = embedder.logits(hidden(embedder, inputs)[is_label])
    pretrain.answer_loss(logits, labels[is_label]).backward()
    return {name: p.grad for name, p in embedder.named_parameters() if p.grad is not None}


def check_hidden(embedder, way):
    """Those of every token."""
    inputs = row_of(embedder)
    with torch.no_grad():
        close(way(embedder, inputs), by_mask(embedder, inputs), "hidden states")


def check_gradients(embedder, way):
    """Those of every parameter, the vision tower's among them, and all together."""
    inputs = row_of(embedder)
    want = gradients(embedder, inputs, by_mask)
    got = gradients(embedder, inputs, way)
    expect(set(got) == set(want), set(want) ^ set(got), "the same parameters", "a detached cache?")
    whole = torch.cat([want[name].flatten() for name in want])
    close(torch.cat([got[name].flatten() for name in want]), whole, "the whole gradient")
    for name, gradient in want.items():
        # Some are zero but for rounding (a bias of keys): next to the whole they must be nothing.
        if gradient.norm() > 1e-4 * whole.norm():
            close(got[name], gradient, f"the gradient of {name}", 1e-4)


def test_hidden_states_through_the_cache_are_those_under_the_mask(family):
    """To 1e-5, head, picture, C, questions and answers; in two families."""
    check_hidden(family, by_cache)


def test_gradients_through_the_cache_are_those_under_the_mask(family):
    """To 1e-5, of the loss on the answers: what C learns through the cache is what it learns under
    the mask."""
    check_gradients(family, by_cache)


def test_the_cache_holds_head_and_code_alone(family):
    """What questions and answers run behind: no key of the content, and fewer than there were."""
    inputs, seen = row_of(family), []

    def watch(run):
        def watched(tokens, positions, past):
            seen.append(None if past is None else {keys.shape[-2] for keys, _ in past})
            return run(tokens, positions, past)

        return watched

    with torch.no_grad():
        by_cache(family, inputs, watch=watch)
    roles = inputs["roles"][0]
    kept = int(((roles <= COMPRESS) & (roles != CONTENT)).sum())
    expect(seen == [None, {kept}], seen, [None, {kept}], "every layer keeps head and C")


# ------------------------------------------------------------------------------ negative controls


def keeps_the_picture(cache, roles):
    return cache


def keeps_the_code_alone(cache, roles):
    code = roles == COMPRESS
    return [(keys[..., code, :], values[..., code, :]) for keys, values in cache]


def one_token_of_the_picture(cache, roles):
    kept = roles.clone()
    kept[(roles == CONTENT).nonzero()[-1]] = COMPRESS
    return WITHOUT_CONTENT(cache, kept)


def is_cut_from_its_graph(cache, roles):
    kept = WITHOUT_CONTENT(cache, roles)
    return [(keys.detach(), values.detach()) for keys, values in kept]


def earlier_by_one(run):
    def shifted(tokens, positions, past):
        return run(tokens, positions - int(past is not None), past)

    return shifted


WITHOUT_CONTENT = mask_as_cache.without_content


@pytest.mark.parametrize(
    "wrong", [keeps_the_picture, keeps_the_code_alone, one_token_of_the_picture]
)
def test_the_check_fails_for_another_cache(family, monkeypatch, wrong):
    """The picture left in it, or a token of it, or the head thrown away as well."""
    monkeypatch.setattr(mask_as_cache, "without_content", wrong)
    with pytest.raises(AssertionError, match="hidden states"):
        check_hidden(family, by_cache)


def test_the_check_fails_for_positions_that_begin_where_the_cache_ends(family):
    """The picture's places in the row stay taken."""

    def closed_up(embedder, inputs):
        return by_cache(embedder, inputs, watch=earlier_by_one)

    with pytest.raises(AssertionError, match="hidden states"):
        check_hidden(family, closed_up)


def test_the_check_of_gradients_fails_for_a_cache_without_its_graph(family, monkeypatch):
    """The same hidden states, and C would learn nothing from the answers."""
    monkeypatch.setattr(mask_as_cache, "without_content", is_cut_from_its_graph)
    check_hidden(family, by_cache)
    with pytest.raises(AssertionError):
        check_gradients(family, by_cache)
