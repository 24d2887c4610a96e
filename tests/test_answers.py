"""Stage 1 learns the answers: their tokens, all of them, and nothing else (CoMa, section 3.1)."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import close, equal, expect

import model
import pretrain
from data import ANSWER, COMPRESS, CONTENT, IMAGE, QUESTION, Item, read_dialogues
from plumbing.errors import OfAllRanks
from plumbing.memory import token_chunks
from plumbing.sampling import ask_first, epoch_batch
from toy.world import Object, Scene

SCENE = Scene((Object("large", "red", "square", "top left", 0),))
TURNS = (("what is at the top left?", "a large red square"), ("count the objects.", "one"))

# ------------------------------------------------------------------------------------------ labels


def worked(embedder):
    """One dialogue with two answers, and a shorter one, padded."""
    items, turns = [Item(IMAGE, (SCENE,))] * 2, [TURNS, TURNS[1:]]
    return embedder.collate(items, turns)


def check_labels(answer_labels, embedder):
    inputs, decode = worked(embedder), embedder.processor.tokenizer.decode
    ids, roles = inputs["input_ids"], inputs["roles"]
    labels = answer_labels(ids, roles)
    equal(tuple(labels.shape), tuple(ids.shape), "one label a position")
    L = ids.shape[1]
    for b in range(len(ids)):
        for i in range(L):  # token by token
            answers = i + 1 < L and roles[b, i + 1] == ANSWER
            want = ids[b, i + 1].item() if answers else -100
            seen = f"row {b}, after {decode(ids[b, : i + 1])[-60:]!r}"
            equal(labels[b, i].item(), want, f"{seen}: the next token if it is an answer's")
    for b, want in enumerate(("a large red square<|im_end|>one<|im_end|>", "one<|im_end|>")):
        equal(decode(labels[b][labels[b] != -100]), want, "the answers and their end, no more")
    first = (labels[1] != -100).nonzero()[0].item()
    equal(decode(ids[1, first]), "<|assistant|>", "the first answer token is predicted from here")


def unshifted(ids, roles):
    return ids.masked_fill(roles != ANSWER, -100)


def with_questions(ids, roles):
    return F.pad(ids[:, 1:].masked_fill(roles[:, 1:] <= COMPRESS, -100), (0, 1), value=-100)


def without_end(ids, roles):
    labels = pretrain.answer_labels(ids, roles)
    return labels.masked_fill(roles.roll(-2, 1) != ANSWER, -100)


def without_first(ids, roles):
    return pretrain.answer_labels(ids, roles).masked_fill(roles != ANSWER, -100)


def predicts_the_past(ids, roles):
    return F.pad(ids[:, :-1].masked_fill(roles[:, :-1] != ANSWER, -100), (1, 0), value=-100)


def test_the_labels_decode_to_the_answers_and_their_end_token(shared):
    """answer_labels, token by token on a worked dialogue: position i predicts token i + 1 where
    that is an answer's or its <|im_end|>; the image, C, questions, template and padding are
    -100."""
    check_labels(pretrain.answer_labels, shared)


@pytest.mark.parametrize(
    "wrong", [unshifted, with_questions, without_end, without_first, predicts_the_past]
)
def test_the_label_check_fails_for_wrong_labels(shared, wrong):
    """Negative control: no shift, a shift the wrong way, questions trained too, first or last token
    of an answer forgotten."""
    with pytest.raises(AssertionError):
        check_labels(wrong, shared)


def test_a_question_is_never_a_label_even_without_a_code():
    """K = 0 (plain instruction tuning): the labels are the same answers."""
    plain = model.load("toy-random", compress_tokens=0, device="cpu")
    check_labels(pretrain.answer_labels, plain)
    inputs = worked(plain)
    expect((inputs["roles"] != COMPRESS).all(), "COMPRESS tokens", "none", "K = 0")


def test_the_token_of_number_0_is_learned_like_any_other(shared):
    """It is a word in some tokenizers: Qwen's "!"."""
    row = shared.collate.row(Item("red"), TURNS)
    answers = row.tokens["roles"] == ANSWER
    row.tokens["input_ids"][answers.nonzero()[1]] = 0
    inputs = shared.collate.pad_rows([row])
    labels = pretrain.answer_logits(shared, inputs)[1]
    equal(labels.tolist(), inputs["input_ids"][0][answers].tolist(), "each token of the answers")


# ------------------------------------------------------------------------------------------ losses


def check_uniform(answer_loss):
    for n, V in ((1, 5), (7, 482)):
        loss = answer_loss(torch.full((n, V), 3.0), torch.arange(n))
        close(loss, n * math.log(V), f"uniform logits: n ln V nats, n = {n}, V = {V}", rel=1e-6)


def test_the_loss_is_a_sum_in_nats():
    """answer_loss of n uniform predictions over V words is n ln V, and it equals a loop."""
    check_uniform(pretrain.answer_loss)
    logits, labels = torch.randn(6, 9), torch.tensor([0, 8, 3, 3, 5, 1])
    want = sum(
        -math.log(row[y].exp() / row.exp().sum())
        for row, y in zip(logits.double(), labels, strict=True)
    )
    close(pretrain.answer_loss(logits, labels), want, "sum of -ln p(label)", rel=1e-6)


def test_the_loss_check_fails_for_a_mean_and_for_bits():
    """Negative control."""
    for wrong in (F.cross_entropy, lambda x, y: pretrain.answer_loss(x, y) / math.log(2)):
        with pytest.raises(AssertionError):
            check_uniform(wrong)


def check_distillation(loss):
    torch.manual_seed(0)
    logits, reference = torch.randn(5, 11), 2 * torch.randn(5, 11)
    zero = loss(reference + torch.arange(5)[:, None], reference).item()
    expect(abs(zero) < 1e-5, zero, "0 at equal distributions", "logits may differ by a constant")
    want = 0.0
    for x, r in zip(logits.double(), reference.double(), strict=True):
        p, q = r.exp() / r.exp().sum(), x.exp() / x.exp().sum()
        want += sum(float(p[v] * math.log(p[v] / q[v])) for v in range(11))
    close(loss(logits, reference), want, "sum of p ln(p / q), p the reference", rel=1e-5)


def test_distillation_is_the_divergence_from_the_reference():
    """distillation_loss: 0 for equal distributions, else KL(reference || model) in nats, summed."""
    check_distillation(pretrain.distillation_loss)


def test_the_distillation_check_fails_for_the_reversed_divergence():
    """Negative control: KL(model || reference), and a mean."""
    for wrong in (lambda x, r: pretrain.distillation_loss(r, x),
                  lambda x, r: pretrain.distillation_loss(x, r) / len(x)):  # fmt: skip
        with pytest.raises(AssertionError):
            check_distillation(wrong)


def test_the_teacher_is_asked_in_the_style_of_the_model():
    """Without a template where the model has none: else it would answer another dialogue."""
    settings = dict(compress_tokens=2, prompt="vlm2vec", pooling="mean", device="cpu")
    embedder = model.load("toy-random", **settings)
    plain, _ = pretrain.teacher(embedder)
    item, turns = Item("red"), (("which?", "blue"),)
    ids = plain.row(item, turns).tokens["input_ids"].tolist()
    tokens = embedder.processor.tokenizer
    equal(ids, tokens("red\nwhich?").input_ids + tokens("blue").input_ids, "no template")


def test_the_teacher_answers_the_same_tokens_with_the_picture_in_view(embedder):
    """teacher: one row of logits for each answer token of the rows with C, in their order, from the
    model as it was, with the picture visible; it does not follow the training."""
    plain, reference = pretrain.teacher(embedder)
    examples = [example(embedder, i, plain=plain) for i in range(2)]
    inputs = embedder.collate.pad_rows([x.row for x in examples])
    labels = pretrain.answer_logits(embedder, inputs)[1]
    got = reference(examples)
    equal(len(got), len(labels), "the same answer tokens on both sides")
    want, plain_labels = [], []
    for x in examples:  # each alone, by the model itself, which sees everything
        with torch.no_grad():
            one = embedder.collate.pad_rows([x.teacher_row])
            logits, labels_of_one = pretrain.answer_logits(embedder, one, compress=False)
        want.append(logits)
        plain_labels.append(labels_of_one)
    close(got, torch.cat(want), "the teacher is the model before training, picture in view")
    equal(torch.cat(plain_labels), labels, "the same answers")
    expect(not got.requires_grad, "a gradient", "none", "the teacher is frozen")
    for p in embedder.parameters():
        p.data.mul_(1.1)
    close(reference(examples), got, "it must be a copy")


# ---------------------------------------------------------------------------------------- gradient


def example(embedder, i, turns=None, plain=None):
    """Dialogue i of the toy world, so many turns of it. plain: the teacher's collator."""
    d = read_dialogues()[i]
    row = embedder.collate.row(d.item, d.turns[:turns])
    plain_row = plain.row(d.item, d.turns[:turns]) if plain else None
    return pretrain.Example(row, plain_row)


def unequal(embedder, plain=None):
    """Dialogues with 1, 5, 2, ... questions: few and many answer tokens."""
    return [example(embedder, i, turns, plain) for i, turns in enumerate((1, 5, 2, 1, 4))]


def gradient(embedder):
    grads = [p.grad for p in embedder.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in grads])


def whole_batch(embedder, examples):
    """Plain autograd, one row at a time: total nats of all answers / all answer tokens."""
    nats, tokens = 0.0, 0
    for x in examples:
        inputs = embedder.collate.pad_rows([x.row])
        h = embedder.hidden(inputs, pretrain.compression_mask(inputs["roles"]))
        ids, is_answer = inputs["input_ids"][0], inputs["roles"][0] == ANSWER
        for i in is_answer.nonzero().flatten().tolist():
            nats = nats - F.log_softmax(embedder.logits(h[0, i - 1]), -1)[ids[i]]
            tokens += 1
    embedder.zero_grad(set_to_none=True)
    (nats / tokens).backward()
    return (nats / tokens).item(), tokens, gradient(embedder)


def check_accumulate(accumulate, embedder, examples):
    loss, tokens, grad = whole_batch(embedder, examples)
    for budget in (1, 150, 320, 10**6):
        embedder.zero_grad(set_to_none=True)
        got = accumulate(embedder, examples, budget)
        hint = f"chunk_tokens={budget}"
        close(got[0], loss, hint + ": mean nats of an answer token")
        equal(int(got[2]), tokens, hint + ": answer tokens")
        close(gradient(embedder), grad, hint + ": sum over chunks, one division at the end", 1e-4)


def mean_of_means(embedder, examples, chunk_tokens):
    rows = [x.row for x in examples]
    chunks = token_chunks([row.length for row in rows], chunk_tokens)
    total, tokens = 0.0, 0
    for chunk in chunks:
        inputs = embedder.collate.pad_rows([rows[i] for i in chunk])
        logits, labels = pretrain.answer_logits(embedder, inputs)
        loss = pretrain.answer_loss(logits, labels) / len(labels) / len(chunks)
        loss.backward()
        total, tokens = total + loss.item(), tokens + len(labels)
    return total, 0.0, tokens


def test_the_gradient_is_that_of_the_whole_batch_for_any_chunks(shared):
    """accumulate: in chunks of one row, some rows, all rows, the gradient of (all answers' nats /
    all answer tokens), however unequal the answers are."""
    check_accumulate(pretrain.accumulate, shared, unequal(shared))


def test_the_share_of_right_answers_is_that_of_all_chunks(shared, monkeypatch):
    """accumulate, where half of each row's answers are right."""

    def half(logits, labels, roles):
        return len(roles), 2 * len(roles)

    monkeypatch.setattr(pretrain, "exact_answers", half)
    for budget in (1, 150, 10**6):
        share = pretrain.accumulate(shared, unequal(shared), budget)[1]
        equal(share, 0.5, f"chunk_tokens={budget}")


def test_a_rank_that_has_no_memory_for_a_chunk_ends_the_step_of_all(shared, monkeypatch):
    """With the way out. No step was taken: those before can still be saved."""

    def no_memory(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(pretrain, "answer_logits", no_memory)
    with pytest.raises(OfAllRanks, match="smaller --chunk-tokens, --checkpointing, or another run"):
        pretrain.accumulate(shared, unequal(shared), 150)


def test_the_gradient_check_fails_for_a_mean_of_chunk_means(shared):
    """Negative control: with unequal answers the mean of means is another loss."""
    with pytest.raises(AssertionError):
        check_accumulate(mean_of_means, shared, unequal(shared))


def test_the_distilled_gradient_is_that_of_the_whole_batch_for_any_chunks(embedder):
    """accumulate with a teacher: the same for every chunk budget; 0 where teacher and model
    agree."""
    plain, reference = pretrain.teacher(embedder)
    examples = unequal(embedder, plain)
    results = []
    for budget in (1, 10**6):
        embedder.zero_grad(set_to_none=True)
        loss, _, _ = pretrain.accumulate(embedder, examples, budget, True, reference)
        results.append((loss, gradient(embedder)))
    (one_by_one, grad), (at_once, grad_at_once) = results
    expect(one_by_one > 1e-2, one_by_one, "> 0.01", "the code hides the picture: KL > 0")
    close(one_by_one, at_once, "loss of one chunk and of many")
    close(grad, grad_at_once, "gradient of one chunk and of many", 1e-4)


# ----------------------------------------------------------------------------------- exact answers


def greedy_row(embedder, scene, n):
    """A single-turn row whose answer is what greedy decoding writes, n tokens of it."""
    row = embedder.collate.row(Item(IMAGE, (scene,)), (("what is it?", "x"),))
    is_answer = row.tokens["roles"] == ANSWER
    prompt = {key: x[~is_answer] for key, x in row.tokens.items()}
    inputs = embedder.collate.pad_rows([row._replace(tokens=prompt)])
    roles = inputs.pop("roles")
    out = embedder.mllm.generate(
        **inputs, do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=0
    )
    tokens = {key: torch.cat([x, x.new_zeros(n)]) for key, x in prompt.items()}
    tokens["input_ids"][-n:] = out[0, roles.shape[1] :]
    tokens["roles"][-n:] = ANSWER
    return row._replace(tokens=tokens)


def exact(embedder, rows):
    inputs = embedder.collate.pad_rows(rows)
    with torch.no_grad():
        logits, labels = pretrain.answer_logits(embedder, inputs, False)
    return pretrain.exact_answers(logits, labels, inputs["roles"])


def test_an_exact_answer_is_one_that_greedy_decoding_writes():
    """exact_answers from one teacher-forced pass agrees with mllm.generate(do_sample=False): all
    right for the generated answers, one less for each answer with one token changed anywhere."""
    embedder = model.load("toy-random", compress_tokens=0, device="cpu").eval()
    torch.manual_seed(0)
    for p in embedder.parameters():
        p.data += 0.1 * torch.randn_like(p)  # so that it does not repeat one word
    scenes = [read_dialogues()[i].item.images[0] for i in range(2)]
    short, long = (greedy_row(embedder, scenes[0], 3), greedy_row(embedder, scenes[1], 6))
    written = long.tokens["input_ids"][long.tokens["roles"] == ANSWER].tolist()
    expect(len(set(written)) > 2, written, "several words", "the test would be too easy")
    equal(exact(embedder, [short, long]), (2, 2), "what greedy decoding writes is right")
    for at in (-6, -4, -1):
        tokens = {key: x.clone() for key, x in long.tokens.items()}
        tokens["input_ids"][at] = (tokens["input_ids"][at] + 1) % 400
        got = exact(embedder, [short, long._replace(tokens=tokens)])
        equal(got, (1, 2), f"token {at} of an answer is not what greedy decoding writes")


def check_exact(exact_answers):
    """Against a loop, on random role layouts: several answers a row, some right up to one token."""
    torch.manual_seed(0)
    for _ in range(30):
        roles = torch.where(torch.rand(3, 14) < 0.6, ANSWER, QUESTION)
        roles[:, 0] = QUESTION
        logits = torch.randn(int((roles == ANSWER).sum()), 5)
        labels = torch.where(torch.rand(len(logits)) < 0.7, logits.argmax(-1), 0)
        wrong = iter((logits.argmax(-1) != labels).tolist())
        right = total = 0
        for row in roles.tolist():
            runs, before = [], QUESTION
            for role in row:
                if role == ANSWER:
                    runs = runs if before == ANSWER else [*runs, []]
                    runs[-1].append(next(wrong))
                before = role
            right, total = right + sum(not any(r) for r in runs), total + len(runs)
        equal(exact_answers(logits, labels, roles), (right, total), "answers, not rows")


def test_answers_are_counted_one_by_one():
    """A wrong token spoils its own answer only, not the next one nor the next row's."""
    check_exact(pretrain.exact_answers)


def test_the_answer_count_fails_for_tokens_and_for_rows():
    """Negative control: counting right tokens, or right rows."""

    def tokens(logits, labels, roles):
        return int((logits.argmax(-1) == labels).sum()), len(labels)

    def rows(logits, labels, roles):
        which = (roles == ANSWER).nonzero()[:, 0]
        wrong = torch.zeros(3).index_add_(0, which, (logits.argmax(-1) != labels).float())
        return int((wrong == 0).sum()), 3

    for wrong in (tokens, rows):
        with pytest.raises(AssertionError):
            check_exact(wrong)


# -------------------------------------------------------------------------------- order of the data


def check_draw(draw):
    n, cfg = 10, pretrain.Config(batch=4, seed=3)
    for world in (1, 2, 4):
        steps = []
        for step in range(10):
            ranks = [draw(n, cfg, step, r, world) for r in range(world)]
            equal([len(x) for x in ranks], [4 // world] * world, "equal shares")
            steps.append(sorted(i for x in ranks for i in x))
        alone = [sorted(draw(n, cfg, step, 0, 1)) for step in range(10)]
        equal(steps, alone, f"world {world}: each step's batch is that of one process")
    order = [i for step in range(10) for i in draw(n, cfg, step, 0, 1)]
    epochs = [order[i : i + n] for i in range(0, 40, n)]
    for e in epochs:
        equal(sorted(e), list(range(n)), "an epoch takes each dialogue once")
    expect(len({tuple(e) for e in epochs}) == 4, epochs, "four orders", "shuffle each epoch anew")
    other = pretrain.Config(batch=4, seed=4)
    expect(draw(n, cfg, 0, 0, 1) != draw(n, other, 0, 0, 1), "the same", "another", "--seed")


def test_an_epoch_visits_each_dialogue_once_for_any_number_of_ranks():
    """epoch_batch: a pure function of (seed, step); the same global batches in world 1, 2 and 4."""
    check_draw(epoch_batch)


def test_the_order_check_fails_for_wrong_draws():
    """Negative control: with replacement, one order for all epochs, all ranks the same data."""

    def replaced(n, cfg, step, rank, world):
        g = torch.Generator().manual_seed(cfg.seed * 1000 + step)
        return torch.randint(n, (cfg.batch,), generator=g).tolist()[rank::world]

    def one_order(n, cfg, step, rank, world):
        mine = range(step * cfg.batch + rank, (step + 1) * cfg.batch, world)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(cfg.seed)).tolist()
        return [order[j % n] for j in mine]

    def same_rank(n, cfg, step, rank, world):
        return epoch_batch(n, cfg, step, 0, world)

    for wrong in (replaced, one_order, same_rank):
        with pytest.raises(AssertionError):
            check_draw(wrong)


def test_the_toy_world_is_drawn_without_an_order_in_memory():
    """10^9 dialogues: the order is the identity, nothing of that size is made."""
    equal(epoch_batch(10**9, pretrain.Config(batch=2), 5, 0, 1), [10, 11], "range, not a table")


# ------------------------------------------------------------------------ beyond the paper: stage 1


def test_a_question_may_stand_before_the_code(shared):
    """In the share of dialogues that is asked for: Q_1 among the content, hidden from its answer;
    the answers and the other turns stay; the choice is a function of (seed, step, dialogue)."""
    dialogues = [read_dialogues()[i] for i in range(200)]
    cfg = pretrain.Config(question_first=0.5)
    asked = [ask_first(d, cfg, step=3) for d in dialogues]
    again = [ask_first(d, cfg, step=3) for d in dialogues]
    expect(asked == again, "differs", "the same", "no state")
    moved = [(d, x) for d, x in zip(dialogues, asked, strict=True) if d != x]
    expect(70 < len(moved) < 130, len(moved), "about half of 200", "the share")
    d, x = moved[0]
    (question, answer), *rest = d.turns
    equal(x.turns, (("", answer), *rest), "only the question moves")
    tokens, decode = shared.collate.row(x.item, x.turns).tokens, shared.processor.tokenizer.decode
    content = decode(tokens["input_ids"][tokens["roles"] == CONTENT])
    expect(question in content, content, question, "before C")
    questions = decode(tokens["input_ids"][tokens["roles"] == QUESTION])
    expect(question not in questions, questions, f"no {question}", "after C")


def test_a_text_may_stand_in_place_of_the_picture():
    """Of the toy world's dialogues a share is about the description, with the same turns."""
    whole, mixed = read_dialogues(), read_dialogues(texts=0.3)
    texts = 0
    for i in range(300):
        d, with_picture = mixed[i], whole[i]
        equal(d.turns, with_picture.turns, "the same questions")
        if not d.item.images:
            texts += 1
            scene = with_picture.item.images[0]
            equal(d.item.text, scene.describe(), "what would be seen")
    expect(60 < texts < 120, texts, "about 90 of 300", "the share")
