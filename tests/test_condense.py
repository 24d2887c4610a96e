"""Stage 2 with a text that C must tell: which side of a pair tells the other's, when, and that the
gradient is that of the whole batch's two losses, on one rank and on two."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import ranks
import threads
import torch
import torch.nn.functional as F
from checks import close, distance, equal
from forked import on_ranks, said_on
from ranks import SOME, TEMPERATURE, gradient

import contrastive
from data import ANSWER, COMPRESS, CONTENT, IMAGE, QUESTION, Item, Pair, read_pairs
from plumbing import loader, start
from plumbing.errors import InputError
from plumbing.ranks import rank, world
from plumbing.weights import first_model
from tools import condense
from toy.world import Shapes

WEIGHT = 3.0
PICTURE = (Shapes().dialogue(0)[0][1][0],)  # a scene
WORDS, SEEN = Item("a red circle"), Item(f"{IMAGE} which one?", PICTURE)


def config(**flags):
    """Of a run of four pairs a step, three of its steps with the texts' loss."""
    return condense.Config(batch=4, block=2, steps=4, condense=WEIGHT, condense_share=0.6, **flags)


@pytest.mark.parametrize(
    ("query", "target", "want"),
    [
        (SEEN, WORDS, (SEEN, "a red circle")),
        (WORDS, SEEN, (SEEN, "a red circle")),
        (WORDS, Item("a disc"), (WORDS, "a disc")),
        (SEEN, SEEN, None),
    ],
)
def test_the_side_that_is_words_alone_is_told_by_the_other(query, target, want):
    """The target where both are words, nothing where both have pictures."""
    equal(condense.side_and_text(Pair(query, (target,))), want, "told")
    others = Item("another"), SEEN
    equal(condense.side_and_text(Pair(query, (target, *others))), want, "of several the first")


def test_rows_end_in_the_text_in_the_first_steps_alone():
    """The matching rows are stage 2's own; the text and the end of its turn are the answer, behind
    C, of which the row has one."""
    collate, cfg = ranks.built("all").collate, config()
    for step in range(4):
        batch = condense.local_batch(ranks.PAIRS, collate, cfg, step, 0, 1)
        plain = contrastive.local_batch(ranks.PAIRS, collate, cfg, step, 0, 1)
        equal((len(batch.rows), batch.ids), (len(plain.rows), plain.ids), "the same pairs")
        equal([x.id for x in batch.examples], plain.ids if step < 3 else [], f"step {step}")
    half = dataclasses.replace(cfg, condense_share=0.5)
    batches = [condense.local_batch(ranks.PAIRS, collate, half, step, 0, 1) for step in range(4)]
    equal([bool(x.examples) for x in batches], [True, True, False, False], "half of four steps")
    batch = condense.local_batch(ranks.PAIRS, collate, cfg, 0, 0, 1)
    for example, name in zip(batch.examples, batch.ids, strict=True):
        pair = pair_of(name)
        ids, roles = (example.row.tokens[key] for key in ("input_ids", "roles"))
        said = collate.tokenizer.decode(ids[roles == ANSWER])
        equal(said, f"{pair.targets[0].text}<|im_end|>", "what C must tell")
        equal(int((roles == COMPRESS).sum()), 4, "C")


def pair_of(name) -> Pair:
    """Of a message's name, pictures[3]."""
    data_set, _, i = name.rstrip("]").partition("[")
    return ranks.PAIRS[data_set][int(i)]


def test_two_ranks_have_their_own_shares():
    """Together the examples of one."""
    collate, cfg = ranks.built("all").collate, config()
    shares = []
    for r in range(2):
        shares += condense.local_batch(ranks.PAIRS, collate, cfg, 0, r, 2).examples
    whole = condense.local_batch(ranks.PAIRS, collate, cfg, 0, 0, 1).examples
    equal([x.id for x in shares], [x.id for x in whole], "both ranks'")


# ------------------------------------------------------------------------------------ the gradient


def batch_of(embedder, cfg, rank=0, world=1):
    return condense.local_batch(ranks.PAIRS, embedder.collate, cfg, 0, rank, world)


def config_of_16():
    """The batch of tests/ranks.py: its last half are words alone."""
    base = ranks.batch_config()
    return condense.Config(
        batch=base.batch, block=base.block, seed=base.seed, chunk_tokens=250, condense=WEIGHT
    )


def nats_by_hand(embedder, examples):
    """Mean next-token loss of the texts, a row at a time under a mask that is written down here:
    what follows C sees neither picture nor text before it."""
    nats, tokens = 0.0, 0
    for example in examples:
        inputs = embedder.collate.pad_rows([example.row])
        (roles,), L = inputs["roles"], inputs["roles"].shape[1]
        mask = torch.ones(L, L).tril().bool()
        for i in range(L):
            if roles[i] > COMPRESS:
                mask[i, roles == CONTENT] = False
        h = embedder.hidden(inputs, mask[None, None])[0]  # (L, D)
        (places,) = torch.where(roles == ANSWER)
        logits = embedder.logits(h[places - 1]).double()
        nats += F.cross_entropy(logits, inputs["input_ids"][0, places], reduction="sum")
        tokens += len(places)
    return nats / tokens


def by_hand(embedder):
    """Both losses of the whole batch at once. -> (their sum, its gradient)."""
    batch = batch_of(embedder, config_of_16())
    embedder.zero_grad(set_to_none=True)
    matching, _ = ranks.plain_loss(embedder(embedder.collate.pad_rows(batch.rows)), batch)
    loss = matching + WEIGHT * nats_by_hand(embedder, batch.examples)
    loss.backward()
    return loss.item(), gradient(embedder)


def by_steps(embedder, rank=0, world=1):
    """condensing_step on one rank's share. -> (loss, gradient)."""
    cfg = config_of_16()
    embedder.zero_grad(set_to_none=True)
    batch = batch_of(embedder, cfg, rank, world)
    step = condense.condensing_step(
        cfg, embedder, batch, TEMPERATURE, SOME, contrastive.loss_over_ranks
    )
    return step.loss, gradient(embedder)


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_the_gradient_is_that_of_both_losses_of_the_whole_batch(trained):
    """InfoNCE and W times the mean over the texts' tokens, each in chunks; up to float32, in which
    stage 1 has its logits."""
    embedder = ranks.built(trained)
    want_loss, want = by_hand(embedder)
    loss, got = by_steps(embedder)
    close(loss, want_loss, "loss", 1e-6)
    close(got, want, "gradient", 1e-6)


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    """Each of its own pairs, and of texts of other lengths than the other's."""
    embedder = ranks.built("all")
    loss, want = by_hand(embedder)

    def main():
        torch.distributed.init_process_group("gloo")
        got_loss, got = by_steps(embedder, rank(), world())
        numbers = [got_loss, distance(got, want)]
        (tmp_path / f"{rank()}.json").write_text(json.dumps(numbers))

    equal(on_ranks(2, main, tmp_path), [0, 0], said_on(tmp_path))
    for r in range(2):
        got_loss, away = json.loads((tmp_path / f"{r}.json").read_text())
        close(got_loss, loss, f"rank {r}: loss", 1e-6)
        assert away < 1e-6, (r, away)


def test_without_a_text_a_step_is_stage_2s_own():
    """After the first steps, or where all pairs are of pictures."""
    embedder = ranks.built("all")
    cfg = config_of_16()
    batch = batch_of(embedder, cfg)._replace(examples=[])
    embedder.zero_grad(set_to_none=True)
    arguments = embedder, batch, TEMPERATURE, SOME, contrastive.loss_over_ranks
    loss = condense.condensing_step(cfg, *arguments).loss
    got = gradient(embedder)
    embedder.zero_grad(set_to_none=True)
    equal(loss, contrastive.gradcache_step(*arguments).loss, "loss")
    equal(got.tolist(), gradient(embedder).tolist(), "gradient")


def test_a_rank_without_a_text_takes_its_part_in_the_others_step(monkeypatch):
    """Or they would wait for it: each rank's sums are over all ranks."""
    cfg, embedder, took_part = config_of_16(), ranks.built("all"), []
    texts = batch_of(embedder, cfg).examples

    def step(embedder, *_):
        for p in embedder.parameters():
            p.grad = torch.zeros_like(p)
        return contrastive.Step(1.0, 0.0, 4, 64)

    def accumulate(embedder, examples, chunk_tokens):
        took_part.append(len(examples))
        for p in embedder.parameters():
            p.grad = torch.zeros_like(p)
        return 2.0, 0.0, 1

    monkeypatch.setattr(contrastive, "gradcache_step", step)
    monkeypatch.setattr(condense.pretrain, "accumulate", accumulate)
    monkeypatch.setattr(condense.ranks, "sum_gradients", lambda parameters: None)

    def work(number):
        batch = condense.Batch([], None, None, [], [] if number else texts)
        return condense.condensing_step(cfg, copy.deepcopy(embedder), batch, 0.1, SOME, None).loss

    equal(threads.on_ranks(monkeypatch, 2, work), [1.0 + WEIGHT * 2.0] * 2, "both ranks")
    equal(sorted(took_part), [0, len(texts)], "accumulate")


def test_texts_go_in_the_chunks_that_fitted_into_memory(monkeypatch):
    """Where stage 2's step has halved them, not in those of the flag."""
    embedder, seen = ranks.built("all"), []

    def step(embedder, *_):
        for p in embedder.parameters():
            p.grad = torch.zeros_like(p)
        return contrastive.Step(1.0, 0.0, 4, 64)

    def accumulate(embedder, examples, chunk_tokens, compress=True):
        seen.append((len(examples) > 0, chunk_tokens, compress))
        embedder(embedder.collate.pad_rows([examples[0].row])).sum().backward()
        return 2.0, 0.0, 1

    monkeypatch.setattr(contrastive, "gradcache_step", step)
    monkeypatch.setattr(condense.pretrain, "accumulate", accumulate)
    loss, _ = by_steps(embedder)
    equal(seen, [(True, 64, True)], "stage 1's own step")
    equal(loss, 1.0 + WEIGHT * 2.0, "both")


def test_workers_share_the_rows_of_texts(monkeypatch):
    """Each makes its own share of them, as of the other rows."""
    collate, share = ranks.built("all").collate, loader.Share(0, 2, halve=False)
    monkeypatch.setattr(loader, "making", [share])
    batch = condense.local_batch(ranks.PAIRS, collate, config(), 0, 0, 1)
    slots = [*batch.rows, *(x.row for x in batch.examples)]
    equal({type(x) for x in slots}, {loader.Slot}, "rows that workers may make")
    equal(len(share.made), len(slots) // 2, "of two workers, half")


# ------------------------------------------------------------------------------------- the command


def test_a_run_trains_with_both_and_saves_an_embedder(tmp_path, monkeypatch):
    """Its log's loss is larger by the text's in the first steps; the folder is one as stage 2's."""
    monkeypatch.chdir(tmp_path)
    flags = dict(model="toy-random", steps=2, batch=4, block=2, workers=0, save_every=0)
    logs = {}
    for name, run in (("plain", contrastive), ("both", condense)):
        more = dict(condense_share=0.5) if run is condense else {}
        run.main(run.Config(out=name, **flags, **more))
        lines = Path(name, "log.jsonl").read_text().splitlines()[1:]
        logs[name] = [json.loads(line) for line in lines]
    told = logs["both"][0]["loss"] - logs["plain"][0]["loss"]
    # About ln of 500 tokens, 5 times: weights that are drawn know nothing of any text.
    assert 5 * 5 < told < 5 * 8, told
    assert Path("both", "nanocoma.json").exists()
    equal(first_model(""), "toy", "what evaluation takes by itself is not this folder")
    assert len(read_pairs()) == 5


def test_sharded_weights_are_refused():
    cfg = condense.Config(fsdp=True, muon_lr=0.0)
    with pytest.raises(InputError, match="--fsdp.*leave it out"):
        condense.main(cfg)


def test_a_length_would_cut_what_is_told():
    cfg = condense.Config(max_length=64, muon_lr=0.0)
    with pytest.raises(InputError, match="--max-length: .*leave it out"):
        condense.main(cfg)


def test_without_compression_tokens_there_is_nothing_that_tells(tmp_path, monkeypatch):
    """And the way out is no flag of another stage."""
    monkeypatch.chdir(tmp_path)
    flags = dict(model="toy-random", steps=1, batch=4, block=2, workers=0, pooling="last")
    with pytest.raises(InputError, match="K = 0.*condense trains K tokens"):
        condense.main(condense.Config(out="x", compress_tokens=0, **flags))


def test_help_reads_the_flags_from_its_file():
    """Those of stage 2, and the two more."""
    read = start.read_config(Path(condense.__file__))
    names = [field for field in read.__dataclass_fields__]
    equal(set(condense.Config.__dataclass_fields__), set(names), "fields")
    equal((read().condense, read().condense_share), (5.0, 0.4), "the defaults")


def test_no_word_of_the_pair_stands_between_the_code_and_the_text():
    """It is told from head and C alone: a question with the other side's words would tell it."""
    collate = ranks.built("all").collate
    cfg = condense.Config(batch=4, block=2, steps=4, condense_share=1.0)
    for example in condense.local_batch(ranks.PAIRS, collate, cfg, 0, 0, 1).examples:
        ids, roles = (example.row.tokens[key] for key in ("input_ids", "roles"))
        said = collate.tokenizer.decode(ids[roles == QUESTION])
        equal(said, "<|im_end|><|user|><|im_end|><|assistant|>", example.id)
