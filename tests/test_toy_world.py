"""The toy world: reproducible, with one right answer, and nothing of the tests in training."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from checks import equal, expect

from data import Item
from toy.world import (
    ASK,
    COLORS,
    HELD_OUT,
    IMAGE,
    INSTRUCT,
    META_TASK,
    PLACES,
    SHAPES,
    SIZES,
    Shapes,
    evaluation_sets,
)

TASKS = tuple(META_TASK)
WORLDS = {
    "train": Shapes(),
    "test": Shapes("test"),
    "new": Shapes("new"),
    "words": Shapes("test", new_words=True),
}
N = 120  # examples of each kind


def picture(content):
    """The one scene of a content (text, images)."""
    (scene,) = content[1]
    return scene


# ------------------------------------------------------------------------------------- reproducible


def digest():
    """Of dialogues, pairs, queries and pixels, all splits and wordings."""
    h = hashlib.sha256()
    for world in WORLDS.values():
        for i in (*range(6), 10**9 - 1):
            content, *_ = dialogue = world.dialogue(i)
            h.update(repr(dialogue).encode())
            h.update(picture(content).render().tobytes())
            for task in TASKS:
                query, candidates = world.query(task, i)
                _, targets, _ = world.pair(task, i)
                keys = [Item(*x).key for x in (query, *candidates, *targets)]
                h.update(repr((query, candidates, keys)).encode())
    return h.hexdigest()


def test_the_toy_world_is_the_same_in_every_process():
    """Dialogues, pairs, queries, keys and pixels are a function of (seed, split, index): twice
    here, and in a fresh process with another PYTHONHASHSEED."""
    here = digest()
    equal(digest(), here, "called twice, in the same order")
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_toy_world as t; print(t.digest())"
    tests = os.path.dirname(__file__)
    env = dict(os.environ, PYTHONHASHSEED="12345")
    command = [sys.executable, "-c", code, tests, os.path.dirname(tests)]
    out = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    equal(out.strip(), here, "hash(), set order or global random state")


def test_the_toy_world_is_the_one_that_weights_and_records_were_made_with():
    """toy/mllm and docs/reproduce.json would mean something else in another one."""
    h = hashlib.sha256()
    for world in WORLDS.values():
        for i in range(20):
            h.update(repr([world.dialogue(i), *(world.query(task, i) for task in TASKS)]).encode())
    equal(h.hexdigest()[:16], "c562f0b244a7be2e", "the draws, their order, a wording, a repr")


def test_examples_do_not_depend_on_what_was_asked_before():
    """The i-th example is the same whether it is the first or the last one made."""
    world = Shapes()
    late = [world.dialogue(i) for i in (7, 3, 9)]
    equal(late, [Shapes().dialogue(i) for i in (7, 3, 9)], "no state")
    expect(Shapes(seed=1).dialogue(3) != late[1], late[1], "another dialogue", "the seed")
    equal(len({str(world.dialogue(i)) for i in range(100)}), 100, "a hundred different dialogues")


# ------------------------------------------------------------------------ an oracle for the answers


def find(text, words):
    """The one of `words` in a text; None where there is none."""
    found = [w for w in words if re.search(rf"\b{w}\b", text)]
    assert len(found) <= 1, (text, found)
    return found[0] if found else None


def answers(scene, question):
    """All that is a right answer to a toy question, from the objects alone."""
    objects = scene.objects
    color, shape = find(question, COLORS), find(question, SHAPES)
    named = [o for o in objects if o.color == (color or o.color) and o.shape == (shape or o.shape)]

    def there(place):
        here = [f"a {o.size} {o.color} {o.shape}" for o in objects if o.place == place]
        assert len(here) <= 1, "two objects at one place"
        return here[0] if here else "nothing"

    if re.search(r"how many|count|number", question):
        return {("zero", "one", "two", "three", "four")[len(objects)]}
    if re.search(r"picture", question):
        return {" and ".join(f"{there(p)} at the {p}" for p in PLACES if there(p) != "nothing")}
    if side := re.search(r"\b(left of|right of|above|below) the", question):
        rows, columns, got = {"top": 0, "bottom": 1}, {"left": 0, "right": 1}, set()
        for o in named:
            row, column = (t[w] for t, w in zip((rows, columns), o.place.split(), strict=True))
            row += {"above": -1, "below": 1}.get(side[1], 0)
            column += {"left of": -1, "right of": 1}.get(side[1], 0)
            assert row in (0, 1) and column in (0, 1), f"{question}: outside of the picture"
            got.add(there(PLACES[2 * row + column]))
        return got
    if re.search(r"what is at|object at|object is at|name the object at", question):
        return {there(find(question, PLACES))}
    if "color" in question:
        return {o.color for o in named}
    if "shape" in question:
        return {o.shape for o in named}
    if re.search("size|small or large", question):
        return {o.size for o in named}
    if re.search("where|place", question):
        return {o.place for o in named}
    raise AssertionError(f"no such question: {question}")


def parse(text):
    """A description or part of one -> {(size, color, shape, place)}."""
    pattern = rf"a ({'|'.join(SIZES)}) (\w+) (\w+) at the ({'|'.join(PLACES)})"
    return set(re.findall(pattern, text))


def attributes(scene):
    return {(o.size, o.color, o.shape, o.place) for o in scene.objects}


def right_candidates(task, query, candidates):
    """The indices of all candidates that are right, found without looking at how they were made."""
    question = query[0].replace(IMAGE, "")
    if task == "classify":
        (o,) = picture(query).objects
        return [i for i, (text, _) in enumerate(candidates) if text == f"{o.color} {o.shape}"]
    if task == "vqa":
        right = answers(picture(query), question)
        expect(len(right) == 1, f"{question}: {right}", "one answer", "an ambiguous question")
        return [i for i, (text, _) in enumerate(candidates) if text in right]
    if task == "i2t":
        want = attributes(picture(query))
        return [i for i, (text, _) in enumerate(candidates) if parse(text) == want]
    if task == "t2i":
        want = parse(question)
        return [i for i, c in enumerate(candidates) if attributes(picture(c)) == want]
    name, right = (find(question, COLORS), find(question, SHAPES)), []
    for i, c in enumerate(candidates):
        (o,) = picture(c).objects
        equal(picture(c).view, o.place, "a crop shows the quadrant of its object")
        if (o.color, o.shape) == name:
            right.append(i)
    return right


def check_one_right(query_of):
    for split in ("test", "new", "words"):
        for task in TASKS:
            for i in range(N):
                query, candidates = query_of(WORLDS[split], task, i)
                right = right_candidates(task, query, candidates)
                equal(right, [0], f"{task}, {split}, query {i}: right candidates of {query[0]!r}")
                distinct = len({Item(*c).key for c in candidates})
                equal(distinct, len(candidates), f"{task}, {split}, {i}: no candidate twice")
                expect(len(candidates) >= 5, len(candidates), ">= 5", f"{task}: too easy")


def test_each_query_has_exactly_one_right_candidate_and_it_is_the_first():
    """By an oracle that reads the scenes' objects, for classify, vqa, i2t, t2i and ground, in the
    test split, the never-seen combinations and the held-out wordings."""
    check_one_right(lambda world, task, i: world.query(task, i))


def second_right(world, task, i):
    query, candidates = world.query(task, i)
    return query, [*candidates[:-1], candidates[0]]


def right_one_later(world, task, i):
    query, candidates = world.query(task, i)
    return query, [*candidates[1:], candidates[0]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wrong", [second_right, right_one_later])
def test_the_oracle_finds_a_second_right_candidate(task, wrong):
    """Negative control, task by task: the right candidate twice, and not in the first place."""
    query, candidates = wrong(WORLDS["test"], task, 0)
    expect(
        right_candidates(task, query, candidates) != [0], "[0]", "another", "the oracle is blind"
    )
    with pytest.raises(AssertionError):
        check_one_right(wrong)


def test_a_training_pair_is_right_too():
    """pair: its one target is right by the same oracle, in the training split."""
    for task in TASKS:
        for i in range(N):
            query, targets, negatives = WORLDS["train"].pair(task, i)
            equal(right_candidates(task, query, targets), [0], f"{task} {i}")
            equal(negatives, (), "no hard negatives")


def check_dialogues(dialogue):
    kinds = Counter()
    for i in range(300):
        content, turns, _ = dialogue(i)
        for question, answer in turns:
            equal(answers(picture(content), question), {answer}, f"dialogue {i}: {question}")
            kinds[answer.split()[0]] += 1
        questions = [q for q, _ in turns]
        equal(len(set(questions)), len(questions), f"dialogue {i}: different questions")
        expect(1 <= len(turns) <= 5, len(turns), "1 to 5 turns", f"dialogue {i}")
    expect(len(kinds) > 15, kinds, "answers of all kinds", "the world is too small")


def test_the_answers_of_a_dialogue_are_right():
    """Each answer is the one right answer to its question, by the oracle, on 300 training
    scenes."""
    check_dialogues(WORLDS["train"].dialogue)
    check_dialogues(WORLDS["words"].dialogue)


def test_the_dialogue_check_fails_for_another_picture():
    """Negative control: the questions of one scene asked of the next one."""

    def shifted(i):
        _, *questions = WORLDS["train"].dialogue(i)
        content, *_ = WORLDS["train"].dialogue(i + 1)
        return content, *questions

    with pytest.raises(AssertionError):
        check_dialogues(shifted)


def test_a_caption_names_everything():
    """--caption: one turn, the full description."""
    for i in range(50):
        content, ((_, answer),), _ = WORLDS["train"].dialogue(i, caption=True)
        equal(parse(answer), attributes(picture(content)), "the description is complete")


# ----------------------------------------------------------------------------------------- held out


def scenes_of(world, n):
    """All scenes that a split's dialogues, queries and pairs are about (not its other
    candidates)."""
    for i in range(n):
        content, *_ = world.dialogue(i)
        yield picture(content)
        for task in TASKS:
            query, (target,), _ = world.pair(task, i)
            yield picture(target if task == "t2i" else query)


def test_test_scenes_never_appear_in_training():
    """By their description, which answers every question: training scenes and test scenes have none
    in common, though scenes of one object are few and drawn many times."""
    seen = {s.describe() for s in scenes_of(WORLDS["train"], 1500)}
    held = {s.describe() for split in ("test", "new", "words") for s in scenes_of(WORLDS[split], N)}
    equal(sorted(seen & held), [], "a test scene in training")
    other = {s.describe() for s in scenes_of(Shapes(seed=1), 1500)}
    expect(len(seen & other) > 100, len(seen & other), "> 100", "negative control: scenes do recur")
    equal(sorted(other & held), [], "for another seed too")


def train_texts(n):
    """Every text of the training split: questions, answers, queries, targets."""
    for i in range(n):
        _, turns, _ = WORLDS["train"].dialogue(i)
        for turn in turns:
            yield from turn
        for task in TASKS:
            (query, _), ((target, _),), _ = WORLDS["train"].pair(task, i)
            yield from (query, target)


def test_held_out_combinations_never_appear_in_training():
    """No training picture shows a held-out colour-shape combination, no training text names one;
    each query of the "new" split is about one."""
    for scene in scenes_of(WORLDS["train"], 1000):
        bad = [o for o in scene.objects if (o.color, o.shape) in HELD_OUT]
        equal(bad, [], "a picture of a held-out combination")
    names = [f"{c} {s}" for c, s in HELD_OUT]
    for text in train_texts(500):
        equal([n for n in names if n in text], [], f"named in {text!r}")
    for task in TASKS:
        for i in range(N):
            query, candidates = WORLDS["new"].query(task, i)
            scene = picture(candidates[0] if task == "t2i" else query)
            bad = [o for o in scene.objects if (o.color, o.shape) in HELD_OUT]
            equal(len(bad), 1, f"{task} {i}: one new combination")
    equal({c for c, _ in HELD_OUT}, set(COLORS), "each colour is seen in training, and held out")


def wordings(rows):
    """Regular expressions of the held-out wordings, and of the others."""

    def pattern(text):
        return re.compile(".+".join(map(re.escape, text.split("{}"))) + r"\s*$")

    held = {k: [pattern(row[-1])] for k, row in rows.items()}
    return held, {k: [pattern(t) for t in row[:-1]] for k, row in rows.items()}


def test_held_out_wordings_never_appear_in_training():
    """The last wording of each question and each instruction: in no training text, in all texts of
    the held-out wordings."""
    held, known = wordings(ASK)
    ask_held, ask_known = ([p for ps in x.values() for p in ps] for x in (held, known))

    def matches(patterns, text):
        return [p.pattern for p in patterns if p.match(text.removeprefix(IMAGE + " "))]

    for i in range(500):
        for question, _ in WORLDS["train"].dialogue(i)[1]:
            equal(matches(ask_held, question), [], f"{question!r} is held out")
            expect(matches(ask_known, question), question, "a known wording", "world.ASK")
        for question, _ in WORLDS["words"].dialogue(i)[1]:
            expect(matches(ask_held, question), question, "a held-out wording", "world.ASK")
    held, known = wordings(INSTRUCT)
    for task in TASKS:
        for i in range(N):
            (text, _), *_ = WORLDS["train"].pair(task, i)
            equal(matches(held[task], text), [], f"{task}: {text!r} is held out")
            (text, _), _ = WORLDS["words"].query(task, i)
            expect(matches(held[task], text), text, held[task], f"{task}: a held-out instruction")


def test_one_thing_is_new_in_each_evaluation_set_and_its_name_says_what():
    """The scenes alone, combinations ("-new"), or wordings ("-words"): else a score of wordings
    would fall for the combinations. The seed draws them all."""
    for seed in (0, 7):
        for name, (task, ood, world) in evaluation_sets(seed).items():
            kind = name.removeprefix(task)
            words = Shapes("test", seed, new_words=True)
            want = {"": Shapes("test", seed), "-new": Shapes("new", seed), "-words": words}[kind]
            equal(world.query(task, 3), want.query(task, 3), f"{name}, seed {seed}")
            equal(ood, kind != "", f"{name}: out of distribution")


# -------------------------------------------------------------------------------------------- other


def test_pictures_show_what_their_description_says():
    """Scenes of different objects have different pixels (a small one's corner of its quadrant is
    seen as well), and each object's colour is in its quadrant."""
    pictures = {}
    for i in range(300):
        content, *_ = WORLDS["train"].dialogue(i)
        scene = picture(content)
        drawn = scene.render()
        equal(drawn.size, (64, 64), "pixels")
        pictures.setdefault(drawn.tobytes(), set()).add(scene.objects)
        for o in scene.objects:
            row, column = divmod(PLACES.index(o.place), 2)
            box = (32 * column, 32 * row, 32 * column + 32, 32 * row + 32)
            rgb = tuple(bytes.fromhex(COLORS[o.color][1:]))
            pixels = int((np.asarray(drawn.crop(box)) == rgb).all(-1).sum())
            expect(pixels > 20, f"{pixels} pixels of {o}", "> 20", "drawn in another place?")
    expect(all(len(x) == 1 for x in pictures.values()), pictures.values(), "one", "two look alike")


def test_equal_items_have_equal_keys_and_others_do_not():
    """Item.key: the same text and pictures, the same 63 bits; for scenes and for PIL images."""
    scene, other = (picture(WORLDS["train"].dialogue(i)[0]) for i in (0, 1))
    pairs = [(Item("a"), Item("a")), (Item(IMAGE, (scene,)), Item(IMAGE, (scene,)))]
    pairs += [(Item(IMAGE, (scene.render(),)), Item(IMAGE, (scene.render(),)))]
    for a, b in pairs:
        equal(a.key, b.key, "equal content")
        expect(0 <= a.key < 2**63, a.key, "63 bits", "fits an int64 tensor")
    items = [Item("a"), Item("b"), Item(IMAGE, (scene,)), Item(IMAGE + "a", (scene,))]
    items += [Item("A"), Item("a "), Item(IMAGE, ("a.png",)), Item(IMAGE, ("A.png",))]
    items += [Item(IMAGE, (other,)), Item(IMAGE, (scene.render(),)), Item(IMAGE, (other.render(),))]
    equal(len({x.key for x in items}), len(items), "different content")
    many = [Item(f"text {i}").key for i in range(100)]
    expect(max(many) > 2**62 and min(many) < 2**60, max(many), "63 bits", "a million items differ")
    equal({key % 2 for key in many}, {0, 1}, "the last bit")


def test_no_object_leaves_its_quadrant():
    """In scenes, candidates and near misses alike: a large one stands in cell 0."""
    for name, world in WORLDS.items():
        for i in range(60):
            _, candidates = world.query("t2i", i)
            for candidate in candidates:
                bad = [o for o in picture(candidate).objects if o.size == "large" and o.cell]
                expect(not bad, bad, "cell 0", f"{name}, t2i {i}")


def test_pairs_captions_and_texts_are_those_of_the_records_too():
    """What stage 2 trains on, and stage 1's variants; of another seed as well."""
    h = hashlib.sha256()
    for world in (*WORLDS.values(), Shapes(seed=1)):
        for i in (*range(20), 10**9 - 1):
            h.update(repr([world.pair(task, i) for task in TASKS]).encode())
            h.update(repr([world.dialogue(i, caption=True), world.dialogue(i, texts=0.5)]).encode())
    equal(h.hexdigest()[:16], "3dc537a19c96f4d0", "the draws, their order, a wording, a repr")
