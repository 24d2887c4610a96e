"""--skip-bad: a run goes on without the examples that `check` found bad, and without no others."""

import json
import shutil

import pytest
from checks import equal, expect

import contrastive
import data
import pretrain
from plumbing import first_pass
from plumbing.errors import InputError
from plumbing.formats import Place, checked_digest
from plumbing.sampling import epoch_batch
from tools import check, export

N = 8  # examples of each list


@pytest.fixture(scope="module")
def toy(once):
    """The toy world as files."""
    return once("skip-bad", lambda folder: export.export(str(folder), N))


@pytest.fixture
def files(toy, tmp_path):
    """A copy to spoil."""
    shutil.copytree(toy, tmp_path / "toy")
    return tmp_path / "toy"


def spoil(files, source, *indices):
    """Makes the pictures of these dialogues or pairs unreadable. -> the list that check writes."""
    for i in indices:
        (path,) = source[i].item.images if hasattr(source[i], "item") else source[i].query.images
        open(path, "wb").close()
    bad = files / "bad.jsonl"
    name = "dialogues.jsonl" if hasattr(source[0], "item") else "MMEB-train"
    assert check.main([str(files / name), "--list-bad", str(bad)]) == 0
    return bad


def test_a_listed_example_gives_its_place_to_the_next_good_one(files):
    """Two in a row, and the last one, whose next is the first; all others stay where they were."""
    talks = str(files / "dialogues.jsonl")
    whole = data.read_dialogues(talks)
    bad = spoil(files, whole, 2, 3, N - 1)
    skipping = data.read_dialogues(talks, Place(skip_bad=str(bad)))
    want = [0, 1, 4, 4, 4, 5, 6, 0]
    equal([d.id for d in skipping], [whole[i].id for i in want], "first_pass.skip")
    equal(
        checked_digest([skipping]),
        checked_digest([whole]),
        "the data are the same, and so is their digest",
    )
    equal(skipping.source.skipped, {2, 3, N - 1}, "what is skipped")


def test_what_is_on_no_list_is_never_skipped(files):
    """Another bad line, another lost picture: the run is refused as without a list."""
    talks = files / "dialogues.jsonl"
    lines = talks.read_text().splitlines(True)
    lines[2] = "{broken\n"
    talks.write_text("".join(lines))
    bad = files / "bad.jsonl"
    assert check.main([str(talks), "--list-bad", str(bad)]) == 0
    place = Place(skip_bad=str(bad))
    assert len(data.read_dialogues(str(talks), place)) == N
    (path,) = data.read_dialogues(str(talks), place)[0].item.images
    (files / path).unlink()
    with pytest.raises(InputError, match="no such picture"):
        checked_digest([data.read_dialogues(str(talks), place)])
    bad.write_text("")
    with pytest.raises(InputError, match="dialogues.jsonl, line 3: not JSON"):
        data.read_dialogues(str(talks), place)


LISTED = {"list": "dialogues.jsonl", "digest": 0, "example": 1, "error": ""}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"list": "other.jsonl"}, "of other data; these are dialogues.jsonl"),
        ({"digest": 1}, "the list has changed since. Check it again"),
        ({"example": N + 1}, "the list has changed since"),
        ({"example": 0}, "the list has changed since"),
        ({"example": "1"}, "line 1: needs {.*tools.check DATA --list-bad"),
        ({"what": 1}, "line 1: needs {"),
    ],
)
def test_a_list_of_other_data_is_refused(files, change, says):
    """Another file, another content, a number that is not there, another form."""
    talks = str(files / "dialogues.jsonl")
    digest = data.read_dialogues(talks).source.digest
    bad = files / "bad.jsonl"
    bad.write_text(json.dumps({**LISTED, "digest": digest, **change}) + "\n")
    with pytest.raises(InputError, match=f"--skip-bad .*{says}"):
        data.read_dialogues(talks, Place(skip_bad=str(bad)))


def test_of_mmebs_files_each_row_is_skipped_in_its_own_set(files):
    """A picture that two sets show is skipped in both; a set that is not chosen is no error."""
    train = str(files / "MMEB-train")
    whole = data.read_pairs(train)
    bad = spoil(files, whole["classify"], 1)
    place = Place(skip_bad=str(bad))
    pairs = data.read_pairs(train, place)
    equal(pairs["classify"].source.skipped, {1}, "classify")
    equal(pairs["classify"][1], whole["classify"][2], "the next good one")
    equal(pairs["vqa"].source.skipped, frozenset(), "vqa is whole")
    assert sorted(data.read_pairs(train, place, "vqa")) == ["vqa"]
    with pytest.raises(InputError, match="all examples of its list are in --skip-bad"):
        many = [json.loads(bad.read_text().splitlines()[0])] * N
        lines = [json.dumps({**x, "example": i + 1}) + "\n" for i, x in enumerate(many)]
        bad.write_text("".join(lines))
        place = Place(skip_bad=str(shutil.copy(bad, files / "all.jsonl")))
        data.read_pairs(train, place)


def test_of_a_set_of_several_files_each_row_is_skipped_in_its_own_file(files):
    """The same rows again behind them, in a second file: the same picture is bad there, too."""
    train = files / "MMEB-train"
    (first,) = train.glob("classify/original*.parquet")
    shutil.copy(first, first.with_name("original-00001-of-00002.parquet"))
    first.rename(first.with_name("original-00000-of-00002.parquet"))
    whole = data.read_pairs(str(train), subsets="classify")["classify"]
    bad = spoil(files, whole, 1)
    pairs = data.read_pairs(str(train), Place(skip_bad=str(bad)), "classify")["classify"]
    equal(pairs.source.skipped, {1, N + 1}, "bad_rows")
    (last,) = [line for line in bad.read_text().splitlines() if "original-00001" in line]
    beyond = files / "beyond.jsonl"
    beyond.write_text(json.dumps({**json.loads(last), "example": N + 1}) + "\n")
    with pytest.raises(InputError, match="beyond.jsonl"):
        data.read_pairs(str(train), Place(skip_bad=str(beyond)), "classify")


def test_a_row_whose_picture_is_nowhere_is_skipped_in_the_first_look_too(files):
    """A set's pictures are looked for before training begins: not those of a row that is listed."""
    train = str(files / "MMEB-train")
    (lost,) = data.read_pairs(train)["classify"][1].query.images
    (files / lost).unlink()
    bad = files / "bad.jsonl"
    equal(check.main([train, "--list-bad", str(bad)]), 0, "it is listed")
    pairs = data.read_pairs(train, Place(skip_bad=str(bad)))
    checked_digest(pairs.values())
    with pytest.raises(InputError, match="no such picture"):
        checked_digest(data.read_pairs(train).values())
    equal(pairs["classify"].source.skipped, {1}, "mmeb.try_sets")


def test_captions_skip_a_bad_picture_both_ways(tmp_path, files):
    """Picture -> captions and caption -> picture keep their lengths and draw all others as ever."""
    folder = tmp_path / "birds"
    shutil.copytree(files / "images", folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))[:4]
    records = [{"file_name": names[i], "text": f"text {i}"} for i in (0, 1, 1, 2, 3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    whole = data.read_pairs(str(folder))
    (folder / names[1]).write_bytes(b"")
    bad = tmp_path / "bad.jsonl"
    check.main([str(folder), "--list-bad", str(bad)])
    pairs = data.read_pairs(str(folder), Place(skip_bad=str(bad)))
    for name, want in (("birds_i2t", [0, 2, 2, 3]), ("birds_t2i", [0, 3, 3, 3, 4])):
        equal(list(pairs[name]), [whole[name][i] for i in want], name)


def drawn(stage, cfg, step) -> set:
    """The indices of the examples of a step."""
    if stage is pretrain:
        return set(epoch_batch(N, cfg, step, 0, 1))
    return {i for _, i in contrastive.draw({"classify": range(N)}, cfg, step)}


@pytest.mark.parametrize("stage", [pretrain, contrastive])
def test_a_run_goes_on_with_a_list_and_counts_what_it_skips(files, tmp_path, stage):
    """A picture that cannot be read ends the run at the step that draws it, and what was trained
    before is saved, though no checkpoint was due; with check's list --resume goes on, and log.jsonl
    counts of each step what stands in another's place."""
    source = files / ("dialogues.jsonl" if stage is pretrain else "MMEB-train")
    flags = dict(model="toy-random", data=str(source), out=str(tmp_path / "out"), workers=0)
    flags.update(steps=6, save_every=0, batch=4, muon_lr=0.0)
    if stage is contrastive:
        flags.update(block=4, subsets="classify")
    cfg = stage.Config(**flags)
    if stage is contrastive:
        examples = data.read_pairs(str(source))["classify"]
    else:
        examples = data.read_dialogues(str(source))
    late = [drawn(stage, cfg, step) - drawn(stage, cfg, 0) for step in range(6)]
    first = next(step for step in range(6) if late[step])
    broken = min(late[first])
    bad = spoil(files, examples, broken)
    for resume in (False, True):
        says = f"not a readable picture.* --resume goes on from step-{first:08d}"
        with pytest.raises(InputError, match=says):
            stage.main(stage.Config(**flags, resume=resume))
    stage.main(stage.Config(**flags, resume=True, skip_bad=str(bad)))
    steps = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()[1:]]
    equal([x["step"] for x in steps], [1, 2, 3, 4, 5, 6], "all steps")
    want = [int(broken in drawn(stage, cfg, step)) for step in range(6)]
    equal([x.get("skipped", 0) for x in steps], want, "how many of a step")


def test_the_same_bad_examples_are_the_same_whatever_their_order(tmp_path):
    """Ranks compare these words, and each hashes texts in its own way: a set has no order."""
    lines = []
    for i in range(300):
        bad = {"list": f"{i % 7}.jsonl", "digest": 7, "example": i + 1}
        lines.append(json.dumps(bad) + "\n")
    said = set()
    for name, order in (("a", lines), ("b", lines[::-1]), ("c", lines + lines[:9])):
        (tmp_path / name).write_text("".join(order))
        said.add(first_pass.digest_of_listed(tmp_path / name))
    equal(len(said), 1, f"first_pass.digest_of_listed: {said}")
    expect(said.pop().startswith("300 examples, "), said, "300 examples", "each once")
