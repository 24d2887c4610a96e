"""What the three reading functions of data.py hand on: ids, seeds, caps, turns, splits, sets; of
the toy world and of files. (Lines and files that are wrong: test_lists.py, test_data.py.)"""

import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest
from checks import equal, expect
from PIL import Image

import data
from data import Dialogue, Item, Pair, read_dialogues, read_pairs, read_tasks
from plumbing import formats
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from plumbing.images import Images, ZipImage
from plumbing.mmeb import what_else
from toy.world import META_TASK

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]


@pytest.fixture
def talks(tmp_path):
    """A list of two dialogues with two questions; the second has no name."""
    more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "a cat"}]
    line = {"id": "named", "image": "a.png", "conversations": TURNS + more}
    file = tmp_path / "two.jsonl"
    file.write_text(json.dumps(line) + "\n" + json.dumps({**line, "id": ""}) + "\n")
    return str(file)


# ---------------------------------------------------------------------------------------- dialogues


def test_a_dialogue_keeps_the_name_that_its_file_gives_it(talks):
    """In messages a user looks for it; one without a name has its place in the file."""
    named, other = read_dialogues(talks)
    equal((named.id, other.id), ("named", f"{talks}[1]"), "Dialogue.id")
    plain = (IMAGE, ("a.png",)), (("What?", "a dog"),), "x"
    equal(Dialogue.of(plain), Dialogue(Item(*plain[0]), plain[1], "x"), "field by field")
    equal(read_dialogues()[3].id, "shapes-train-3", "of the toy world its number")


BESIDE = "model source data_source dataset split url width height license"


@pytest.mark.parametrize("key", BESIDE.split())
def test_what_published_lists_say_beside_an_example_is_taken(talks, key, tmp_path):
    """And changes nothing: of dialogues, pairs and captions."""
    before = list(read_dialogues(talks))
    lines = [json.loads(line) for line in Path(talks).read_text().splitlines()]
    Path(talks).write_text("".join(json.dumps({**line, key: 7}) + "\n" for line in lines))
    equal(list(read_dialogues(talks)), before, "a dialogue")
    pair = {"query": {"text": "q"}, "target": {"text": "t"}, key: 7}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (pairs,) = read_pairs(str(tmp_path / "pairs.jsonl")).values()
    equal(pairs[0], Pair(Item("q"), (Item("t"),)), "a pair")
    (tmp_path / "birds").mkdir()
    caption = {"file_name": "a.png", "text": "one", key: 7}
    (tmp_path / "birds" / "metadata.jsonl").write_text(json.dumps(caption) + "\n")
    equal(len(read_dialogues(str(tmp_path / "birds"))), 1, "a caption")


def test_what_only_the_toy_world_can_do_is_refused_of_a_file(talks):
    """Descriptions as answers, or in the picture's place; each alone."""
    for flags in ({"caption": True}, {"texts": 0.5}):
        with pytest.raises(InputError, match="go with --data shapes; a file brings its own"):
            read_dialogues(talks, **flags)


def test_so_many_questions_are_kept_and_all_where_nothing_is_asked_for(talks):
    """Of a file and of the toy world."""
    for source in (talks, "shapes"):
        whole = read_dialogues(source)[0].turns
        expect(len(whole) > 1, whole, "several", "too easy")
        for turns, want in ((0, len(whole)), (1, 1), (99, len(whole))):
            equal(len(read_dialogues(source, turns=turns)[0].turns), want, f"turns={turns}")
        equal(read_dialogues(source, turns=1)[0].turns, whole[:1], "the first one")


def test_the_seed_chooses_the_toy_worlds_dialogues():
    """The same for the same seed."""
    one, again, other = (
        [str(read_dialogues(seed=seed)[i].turns) for i in range(5)] for seed in (0, 0, 1)
    )
    equal(one, again, "a function of the seed")
    expect(one != other, one, "other dialogues", "Shapes(seed)")


# -------------------------------------------------------------------------------------------- pairs


def first_pairs(**flags) -> dict:
    return {name: [repr(pairs[i]) for i in range(3)] for name, pairs in read_pairs(**flags).items()}


def test_the_seed_chooses_the_toy_worlds_pairs():
    """In each of its sets."""
    one, again, other = (first_pairs(seed=seed) for seed in (0, 0, 1))
    equal(one, again, "a function of the seed")
    for name in META_TASK:
        expect(one[name] != other[name], one[name], "other pairs", f"{name}: Shapes(seed=...)")


def test_a_cap_is_the_number_of_the_toy_worlds_pairs():
    """Without one there are as many as one likes; only the chosen sets are there."""
    pairs = read_pairs(subsets="vqa:7,classify")
    equal({name: len(x) for name, x in pairs.items()}, {"vqa": 7, "classify": 10**9}, "caps")
    equal(list(read_pairs()), list(META_TASK), "all of them")


def test_a_pair_is_its_query_all_its_targets_and_all_its_negatives():
    """Pair.of, field by field."""
    plain = ("q", ()), [("a", ()), ("b", ())], [(IMAGE, ("c.png",)), ("d", ())]
    want = Pair(Item("q"), (Item("a"), Item("b")), (Item(IMAGE, ("c.png",)), Item("d")))
    equal(Pair.of(plain), want, "Items")


@pytest.fixture
def mmeb(tmp_path):
    """Two sets in MMEB-train's layout, in two wordings each."""
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        for split in ("original", "diverse_instruction"):
            texts = [f"{name} {split} {i}" for i in range(3)]
            columns = {"qry": texts, "pos_text": texts, "qry_image_path": [""] * 3}
            table = pyarrow.table({**columns, "pos_image_path": [""] * 3})
            pq.write_table(table, tmp_path / name / f"{split}-00000-of-00001.parquet")
    return str(tmp_path)


def test_of_mmebs_sets_the_chosen_ones_are_read_in_the_chosen_wording(mmeb):
    """Names, caps, and the split."""
    texts = {name: [x.query.text for x in pairs] for name, pairs in read_pairs(mmeb).items()}
    equal(texts, {name: [f"{name} original {i}" for i in range(3)] for name in "AB"}, "all")
    pairs = read_pairs(mmeb, subsets="B:2", split="diverse_instruction")
    texts = {name: [x.query.text for x in pairs] for name, pairs in pairs.items()}
    equal(texts, {"B": ["B diverse_instruction 0", "B diverse_instruction 1"]}, "chosen")


def with_a_picture(tables) -> str:
    """A folder with a set's tables, for training and for evaluation, that name a.png."""
    Path(tables, "A").mkdir(parents=True)
    train = dict(qry="<|image_1|>", qry_image_path="a.png", pos_text="x", pos_image_path="")
    test = dict(qry_text="<|image_1|>", qry_img_path="a.png", tgt_text=["x"], tgt_img_path=[""])
    for name, row in (("original", train), ("test", test)):
        table = pyarrow.table({key: [x] for key, x in row.items()})
        pq.write_table(table, Path(tables, "A", f"{name}-0.parquet"))
    return str(tables)


def test_the_pictures_of_mmebs_folders_may_lie_elsewhere(tmp_path):
    """--image-root, for training and for evaluation: the tables and the pictures are two downloads
    of the hub."""
    tables, pictures = with_a_picture(tmp_path / "tables"), str(tmp_path / "pictures")
    Path(pictures).mkdir()
    Image.new("RGB", (32, 32)).save(f"{pictures}/a.png")
    want = (f"{pictures}/a.png",)
    equal(read_pairs(tables, pictures)["A"][0].query.images, want, "training")
    (task,) = read_tasks(tables, pictures)
    equal(task.queries[0][0].images, want, "evaluation")


def test_the_pictures_of_a_set_may_lie_in_a_zip_of_its_name(tmp_path):
    """For training and for evaluation."""
    tables = with_a_picture(tmp_path)
    (tmp_path / "images_zip").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "images_zip" / "A.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    (tmp_path / "a.png").unlink()
    want = (ZipImage(str(tmp_path / "images_zip" / "A.zip"), "a.png"),)
    equal(read_pairs(tables)["A"][0].query.images, want, "mmeb.train_rows")
    (task,) = read_tasks(tables)
    equal(task.queries[0][0].images, want, "mmeb.eval_rows")


def test_a_set_s_zip_is_indexed_before_workers_are_forked(mmeb, monkeypatch):
    """Else each of them reads its table anew: of training, and of evaluation."""
    row = dict(qry_text="q", qry_img_path="", tgt_text=["x", "y"], tgt_img_path=["", ""])
    table = pyarrow.table({key: [x] for key, x in row.items()})
    pq.write_table(table, Path(mmeb, "B", "test-0.parquet"))
    prepared = []
    monkeypatch.setattr(Images, "prepare", lambda images, subset: prepared.append(subset))
    read_pairs(mmeb)
    equal(prepared, ["A", "B"], "mmeb.train_rows")
    read_tasks(mmeb)
    equal(prepared, ["A", "B", "B"], "mmeb.eval_rows")


@pytest.mark.parametrize("split", ["original", "diverse_instruction"])
def test_a_folder_for_training_is_said_to_be_one(tmp_path, split):
    """Of either split, where the tables of the other task are looked for."""
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / f"{split}-0.parquet").touch()
    said = what_else(tmp_path)
    expect("lists are for training" in said, said, split, "mmeb.what_else")


def test_sets_are_chosen_of_what_has_several(tmp_path):
    """A list of pairs is one set, with or without a choice."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"query": {"text": "q"}, "target": {"text": "t"}}) + "\n")
    equal(list(read_pairs(str(file))), ["pairs"], "its name")
    with pytest.raises(InputError, match="--subsets A: chooses sets of MMEB or shapes"):
        read_pairs(str(file), subsets="A")


@pytest.fixture
def birds(tmp_path):
    """A folder of two pictures, of which one has two captions."""
    lines = [("a.png", "one"), ("b.png", "two"), ("a.png", "three")]
    text = "".join(json.dumps({"file_name": name, "text": x}) + "\n" for name, x in lines)
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "metadata.jsonl").write_text(text)
    return str(tmp_path / "birds")


def test_a_caption_is_the_answer_to_a_request_to_describe(birds):
    """One dialogue each, in their order."""
    dialogues = list(read_dialogues(birds))
    names = [Path(x.item.images[0]).name for x in dialogues]
    equal(names, ["a.png", "b.png", "a.png"], "pictures")
    equal({x.item.text for x in dialogues}, {IMAGE}, "the picture alone")
    equal(
        [x.id for x in dialogues], [f"{birds}/metadata.jsonl, line {n}" for n in (1, 2, 3)], "names"
    )
    questions, answers = zip(*[turn for x in dialogues for turn in x.turns], strict=True)
    equal(answers, ("one", "two", "three"), "the captions")
    equal(len(set(questions)), 1, "one request for all")
    expect("escribe" in questions[0], questions, "describe", "formats.DESCRIBE")


def test_captions_are_found_by_pictures_and_pictures_by_captions(birds):
    """All captions of a picture are right for it, and no negatives of each other. A query says what
    is looked for, as MMEB's do."""
    pairs = read_pairs(birds)
    equal({x.query.text for x in pairs["birds_i2t"]}, {formats.FIND_CAPTION}, "i2t's instruction")
    asked = [f"{formats.FIND_PICTURE}{text}" for text in ("one", "two", "three")]
    equal([x.query.text for x in pairs["birds_t2i"]], asked, "t2i's instruction")
    a, b = f"{birds}/a.png", f"{birds}/b.png"
    to_text = [(x.query.images, [t.text for t in x.targets]) for x in pairs["birds_i2t"]]
    equal(to_text, [((a,), ["one", "three"]), ((b,), ["two"])], "picture to text")
    to_picture = [(x.query.text.split()[-1], x.targets) for x in pairs["birds_t2i"]]
    images = [(Item(IMAGE, (name,)),) for name in (a, b, a)]
    equal(to_picture, list(zip(("one", "two", "three"), images, strict=True)), "text to picture")


def test_what_is_a_list_and_what_may_be_a_name_on_the_hub(birds, talks, tmp_path):
    """A file, whatever its name; a name that ends as a list's; a folder with captions. Neither a
    folder without, nor a name that is nowhere here."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "words").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "metadata.csv").symlink_to("nowhere")
    there = [str(tmp_path / name) for name in ("words", "link", "lost")]
    for source in (birds, talks, *there, "no/such.csv", "no/such.json", "NO.JSONL"):
        equal(formats.is_list(source), True, source)
    for source in (str(tmp_path / "plain"), "team/set", "set"):
        equal(formats.is_list(source), False, source)


# ------------------------------------------------------------------------------------------- tasks


def test_the_toy_worlds_sets_are_five_tasks_in_three_worlds():
    """In distribution, unseen combinations, unseen wordings: by their names, other queries each."""
    tasks = {task.name: task for task in read_tasks(limit=3)}
    equal(len(tasks), 15, "5 tasks, 3 worlds")
    for name, task in tasks.items():
        base = name.split("-")[0]
        equal((task.ood, task.meta_task), (name != base, META_TASK[base]), name)
        mine = [repr(query) for query, _ in task.queries]
        theirs = [repr(query) for query, _ in tasks[base].queries]
        expect(name == base or mine != theirs, mine, "other queries", name)


def test_the_seed_chooses_the_toy_worlds_queries():
    """In each set."""
    one, other = (
        {x.name: [repr(q) for q, _ in x.queries] for x in read_tasks(limit=3, seed=seed)}
        for seed in (0, 1)
    )
    for name in one:
        expect(one[name] != other[name], one[name], "other queries", f"{name}: seed")


def test_keys_tell_texts_from_pictures_and_pictures_from_each_other():
    """By their text, and by names and number of their pictures; 63 bits, no sign."""
    items = [
        Item("a"), Item("b"), Item(IMAGE, ("a",)), Item(IMAGE, ("b",)), Item("", ()),
        Item(IMAGE * 2, ("a", "b")), Item(IMAGE * 2, ("b", "a")), Item(f"a{IMAGE}", ("a",)),
    ]  # fmt: skip
    keys = [x.key for x in items]
    equal(len(set(keys)), len(items), f"all differ: {keys}")
    expect(all(0 <= key < 2**63 for key in keys), keys, "0 ... 2^63", "torch's integers")
    expect(max(keys) > 2**60, keys, "63 bits", "collisions would hide negatives")
    equal([Item(x.text, x.images).key for x in items], keys, "of what they hold")
    equal(data.Item("a").key, items[0].key, "no state")
