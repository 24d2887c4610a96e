"""What careless users, odd machines and files from elsewhere bring, beyond what the other files of
tests hold: refused in a line where it is wrong, taken where it is only unusual, and nothing of
anybody's is written over."""

import codecs
import errno
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from checks import change, equal
from forked import Fork
from PIL import Image

import contrastive
import data
import evaluate
import model
from plumbing import checkpoint, ending, outfolder, ranks, score_file, start
from plumbing.errors import InputError
from plumbing.families import refuse_longer
from plumbing.folders import STALE, read_json, refuse_foreign
from plumbing.lines import MOST, open_lines, parse_json
from plumbing.retrieval import read_named
from tools import check, compare_logs, explain, export, generate, merge, mine
from tools.pictures import find_pictures

LOG = Path(__file__).parent.parent / "docs" / "logs" / "pretrain.jsonl"
PAIRS = [{"query": {"text": f"{x}?"}, "target": {"text": x}} for x in ("red", "blue", "green")]
TALK = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a dog"}]


def refused(what, *says):
    """Calls `what`, which must raise an InputError that says all of this."""
    with pytest.raises(InputError) as caught:
        what()
    for text in says:
        assert text in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 700, str(caught.value)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a picture and a list of pairs."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("a.png")
    Path("pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in PAIRS))
    return tmp_path


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("text", ["1_0", "١٢", "１２", "1_0e-3"])
@pytest.mark.parametrize("name", ["--steps", "--lr"])
def test_numbers_are_of_plain_digits(name, text, capsys):
    """To Python `1_0` is ten, and so are the digits of any script; a slip of a hand to us."""
    with pytest.raises(SystemExit) as end:
        contrastive.Config.parse([name, text])
    equal((end.value.code, "invalid" in capsys.readouterr().err), (2, True), "in_plain_digits")
    refused(lambda: data.read_pairs(subsets=f"classify:{text}"), "--subsets")


def test_plain_digits_are_taken_with_a_sign_or_an_exponent():
    cfg = contrastive.Config.parse(["--steps", "+7", "--lr", "1e-3", "--seed", "007"])
    equal((cfg.steps, cfg.lr, cfg.seed), (7, 1e-3, 7), "in_plain_digits")


def test_an_environment_whose_numbers_are_none_is_one_line(monkeypatch):
    """Not torchrun's, which sets them all."""
    good = dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="x", MASTER_PORT="1")
    for name, value in (*good.items(), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    ranks.check_environment(None)
    for name in ("LOCAL_WORLD_SIZE", "RANK"):
        for value in ("abc", "٠"):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                refused(lambda: ranks.check_environment(None), f"{name}=", "not a number")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    ranks.check_environment(None)


# ------------------------------------------------------------------------------------------- lists

TEXT = "".join(json.dumps(x) + "\n" for x in PAIRS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "is UTF-32; save it as UTF-8"),
        (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "is UTF-32; save it as UTF-8"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "has NUL bytes, as UTF-16 has"),
        (b"\x28\xb5\x2f\xfd\4\0\x8b", "compressed (zstd); unpack it"),
        (b"\xfd7zXZ\0\0", "compressed (xz); unpack it"),
        (b"BZh91AY&SY\xff", "compressed (bzip2); unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
)
def test_a_list_that_is_no_text_is_called_what_it_is(tmp_path, content, says):
    (tmp_path / "a.jsonl").write_bytes(content)
    refused(lambda: open_lines(tmp_path / "a.jsonl"), "a.jsonl", says)


def test_a_long_text_in_a_csv_is_read(tmp_path):
    """Python's module takes 128 kB, a list of JSON 16 MB: all lists take as much."""
    path = tmp_path / "a.csv"
    path.write_text("file_name,text\na.png," + "x" * 200_000 + "\n")
    lines = open_lines(path)
    equal(len(parse_json(lines.line(0))["text"]), 200_000, "csv.field_size_limit")
    path.write_text("file_name,text\na.png," + "x" * (MOST + 1) + "\n")
    refused(lambda: open_lines(path), "a.csv", f"{MOST}", "no text longer than 16 MB")


@pytest.mark.parametrize(
    ("name", "content"), [("L.JSON", json.dumps(PAIRS)), ("L.CSV", "query,target\n1,2\n3,4\n5,6\n")]
)
def test_a_list_s_ending_may_be_in_capitals(tmp_path, name, content, capsys):
    (tmp_path / name).write_text(content)
    equal(len(open_lines(tmp_path / name)), 3, "os.path.splitext")
    out = check.clean_path(str(tmp_path / name), tmp_path / name, "good.JSON")
    equal(out.name, "good.jsonl", "lines of JSON")


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([{"from": "user", "value": "what?"}, TALK[1]], "human and gpt take turns, and it has"),
        ([{"from": "system", "value": "be brief"}, *TALK], "conversations[0]"),
        (TALK[:1], "a list of questions and answers in turn"),
    ],
)
def test_other_roles_are_named(place, turns, says):
    """Of ShareGPT's other form, of a system's turn; the first one that does not fit."""
    line = {"image": "a.png", "conversations": turns}
    Path("t.jsonl").write_text(json.dumps(line) + "\n")
    refused(lambda: data.read_dialogues("t.jsonl"), "t.jsonl, line 1", says)


def test_captions_one_folder_below_are_found_for_the_message(place):
    """`DIR/train/metadata.jsonl`, as the hub has them."""
    Path("p/train").mkdir(parents=True)
    Path("p/train/metadata.jsonl").write_text("{}\n")
    refused(lambda: data.read_pairs("p"), "pictures with captions, give p/train")


def test_a_set_that_stands_twice_in_sets_json_is_refused(tmp_path):
    """Python keeps the second, and says nothing."""
    one = '"A": {"meta_task": "VQA"}'
    (tmp_path / "A").mkdir()
    (tmp_path / "sets.json").write_text(f"{{{one}}}")
    equal(read_named(tmp_path), {"A": ("VQA", False)}, "read_named")
    (tmp_path / "sets.json").write_text(f"{{{one}, {one}}}")
    refused(lambda: read_named(tmp_path), "sets.json", '"A" stands twice')


def test_a_set_that_sets_json_names_and_that_is_not_there_is_refused(tmp_path):
    """A slip in a name would leave the set as "Other", in distribution."""
    (tmp_path / "classify").mkdir()
    (tmp_path / "sets.json").write_text('{"clasify": {"meta_task": "Classification"}}')
    refused(lambda: read_named(tmp_path), "sets.json", "names clasify", "no folder clasify")


def test_check_says_by_its_status_that_a_list_is_of_no_use(place, capsys):
    """`check --clean good.jsonl && pretrain.py --data good.jsonl`: with one that is not there."""
    Path("bad.jsonl").write_text("{}\n")
    Path("half.jsonl").write_text(TEXT + "{}\n")
    for words, status in (
        (["bad.jsonl", "--clean", "g.jsonl"], 1),
        (["half.jsonl", "--clean", "g.jsonl"], 0),
        (["half.jsonl", "--list-bad", "b.jsonl"], 0),
        (["half.jsonl"], 1),
        (["pairs.jsonl"], 0),
    ):
        equal((words, check.main(words)), (words, status), capsys.readouterr().out)
    Path("packed.jsonl").write_bytes(b"BZh9")
    equal(check.main(["packed.jsonl", "--clean", "g.jsonl", "--list-bad", "b.jsonl"]), 1, "useless")


# ------------------------------------------------------------------------------------ nothing lost


def test_what_is_there_and_is_of_another_kind_is_never_written_over(place, capsys):
    """Scores, lists and pages in the place of pictures, configs and lists; their own of before are
    replaced, and so is an empty file."""
    Path("config.json").write_text('{"model_type": "x"}')
    Path("metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}\n')
    Path("notes.txt").write_text("mine\n")
    shutil.copy(LOG, "log.jsonl")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    for name in before:
        refused(
            lambda n=name: score_file.kept(evaluate.Config(json=n), ""), "--json", "so it stays"
        )
        page = SimpleNamespace(html=name, data="shapes")
        refused(lambda page=page: explain.write_html(page, None), "--html", "so it stays")
        Path("out").mkdir(exist_ok=True)
        if name != "log.jsonl":
            shutil.copy(name, "out/log.jsonl")
            cfg = contrastive.Config(out="out")
            refused(lambda cfg=cfg: outfolder.take(cfg), "--out out/log.jsonl", "so it stays")
        if name != "pairs.jsonl":
            words = ["pairs.jsonl", "--list-bad", name]
            refused(lambda words=words: check.main(words), "--list-bad", "so it stays")
    for name in ("a.png", "config.json", "notes.txt"):
        words = ["--data", "pairs.jsonl", "--out", name]
        if name != "config.json":  # one line of JSON, as a list has them
            refused(lambda words=words: mine.main(words), "--out", "so it stays")
            words = ["pairs.jsonl", "--clean", name]
            refused(lambda words=words: check.main(words), "--clean", "so it stays")
    equal(Path("out/log.jsonl").read_bytes(), before["pairs.jsonl"], "the last that was tried")
    shutil.rmtree("out")
    equal({path.name: path.read_bytes() for path in place.iterdir()}, before, "nothing is lost")
    Path("scores.json").write_text('{"overall": 0.5}')
    Path("empty.json").touch()
    for name in ("scores.json", "empty.json", "new.json"):
        score_file.kept(evaluate.Config(json=name), "")


def test_the_picture_of_two_curves_is_a_picture_and_none_of_the_logs(place):
    shutil.copy(LOG, "a.png")
    for out, says in (
        ("a.png", "written over what is read"),
        (str(LOG), "written over what is read"),
        ("a.foo", "no kind of picture; end it with .png"),
        ("curve", "no kind of picture; end it with .png"),
    ):
        refused(lambda out=out: compare_logs.main(["a.png", str(LOG), "--out", out]), "--out", says)


def test_an_export_goes_into_a_folder_of_its_own(place, capsys):
    """A new one, an empty one, an earlier export's, one that was cut off; never beside others."""
    refused(lambda: export.main(["."]), "holds files that are no export's; take a new folder")
    equal(Path("pairs.jsonl").read_text(), TEXT, "one's own list")
    Path("empty").mkdir()
    for folder in ("new", "empty", "new"):
        export.main([folder, "--examples", "1"])
    Path("new/pairs.jsonl").unlink()
    export.main(["new", "--examples", "2"])
    assert "python contrastive.py --data DIR/pairs.jsonl" in Path("new/README.md").read_text()


def test_a_model_takes_no_place_of_other_files(place, embedder):
    """A folder that is no model's, with files of names that a model has: `--out .` in a project."""
    Path("config.json").write_text('{"album": "holidays"}')
    Path("tokenizer_of_mine.py").write_text("x")
    says = "is no model's folder, and holds config.json"
    refused(lambda: model.save(embedder, "."), says)
    refused(lambda: outfolder.take(contrastive.Config(out=".", model="toy")), says)
    refused(lambda: merge.main(["toy", str(place)]), says)
    equal(json.loads(Path("config.json").read_text()), {"album": "holidays"}, "it stays")
    Path("config.json").unlink()
    model.save(embedder, ".")
    model.save(embedder, ".")  # one's own of before
    assert Path("tokenizer_of_mine.py").exists() and Path("a.png").exists(), STALE
    for name in ("config.json", "nanocoma.json"):
        Path(name).unlink()
    refused(lambda: refuse_foreign("."), "holds")
    Path(".part").mkdir()  # a run was killed in the midst of `put_in_place`
    refuse_foreign(".")


def test_a_list_of_failures_that_cannot_be_written_is_said_before_the_work(place):
    """After hours of it, it was a traceback."""
    Path("t.jsonl.failed.jsonl").mkdir()
    words = ["--images", ".", "--model", "toy", "--out", "t.jsonl"]
    refused(lambda: generate.main(words), "t.jsonl.failed.jsonl", "a folder")


def test_two_generators_do_not_write_one_list(place):
    """Each would ask about all pictures, and every dialogue would be there twice; where nothing
    came of it no empty list is left."""
    Image.new("RGB", (64, 64)).save("x.png")
    Path("q.txt").write_text("what is it?\n")
    words = ["--images", ".", "--model", "toy", "--questions", "q.txt", "--out", "t.jsonl"]
    with generate.alone("t.jsonl"):
        refused(lambda: generate.main(words), "t.jsonl", "another tools.generate writes it")
    assert not Path("t.jsonl").exists()
    with generate.alone("t.jsonl"):
        generate.append_whole("t.jsonl", generate.line_of("x.png", [("a", "b")]), "--out")
        refused(lambda: generate.main(words), "another tools.generate writes it")
    equal(generate.read_done(Path("t.jsonl")), {"x.png"}, "stays")


def test_a_list_that_was_removed_or_moved_meanwhile_is_not_another_one(place):
    """Between opening it and holding it the other generator may end, and remove its empty list;
    and what nothing came of is removed only where it still is one's own."""
    hold = generate.fcntl.flock

    def removed_meanwhile(file, how):
        Path("t.jsonl").unlink()
        hold(file, how)

    with mock.patch.object(generate.fcntl, "flock", removed_meanwhile):
        refused(lambda: generate.alone("t.jsonl").__enter__(), "another tools.generate writes it")
    with generate.alone("t.jsonl"):
        Path("t.jsonl").unlink()
        Path("t.jsonl").write_text("of another\n")
    equal(Path("t.jsonl").read_text(), "of another\n", "generate.is_at")


def test_failures_of_before_stay_where_the_disk_is_full(place):
    """The message says that they do."""
    Path("f.jsonl").write_text("old")
    full = OSError(28, "No space left on device")
    with mock.patch("pathlib.Path.write_text", side_effect=full):
        refused(lambda: generate.list_failures({"a.png": "x"}, Path("f.jsonl")), "stays as it was")
    equal(Path("f.jsonl").read_text(), "old", "list_failures")
    generate.list_failures({}, Path("f.jsonl"))
    assert not Path("f.jsonl").exists(), "nothing failed"


def test_half_a_picture_of_a_killed_command_is_none(place, capsys):
    """A search of pictures would find the sheet that an earlier one has half drawn."""
    Image.new("RGB", (8, 8)).save("x.png")
    Path(".0123456789abcdef.part.png").write_bytes(Path("x.png").read_bytes())
    assert "x.png" in find_pictures(".")
    assert not any("part" in name for name in find_pictures("."))
    assert "half of a file; remove it if no command writes it now" in capsys.readouterr().out


def test_a_clean_copy_of_sets_keeps_what_they_are(place):
    """Else all would be "Other", and in distribution."""
    export.export("e", 2)
    check.main(["e/MMEB-eval", "--clean", "copy"])
    equal(read_named("copy"), read_named("e/MMEB-eval"), "sets.json")
    shutil.rmtree("e/MMEB-eval/vqa")
    check.copy_sets("e/MMEB-eval", "other")
    assert not Path("other").exists(), "of sets that are there"


def test_an_unfinished_run_s_folder_is_called_so(place, folder, capsys):
    """As a model, and as the place of another one."""
    Path("out/checkpoints/step-00000002").mkdir(parents=True)
    Path("out/config.json").write_text("{}")
    refused(lambda: model.load("out"), "its run is not finished", "--resume")
    Path("out/config.json").unlink()
    # A second run into OUT was killed: the weights in it are still the first one's.
    shutil.copytree(folder, "twice")
    Path("twice/finished.json").unlink(missing_ok=True)
    Path("twice/checkpoints/step-00000002").mkdir(parents=True)
    capsys.readouterr()
    model.load("twice")
    said = capsys.readouterr().out
    assert "--model twice: a run into it is not finished" in said and "of the run before" in said
    # The same, before its first checkpoint.
    Path("twice/checkpoints/step-00000002").rmdir()
    Path("twice/checkpoints/lock").write_text("process 1 on here")
    model.load("twice")
    assert "--model twice: a run into it is not finished" in capsys.readouterr().out
    Path("twice/checkpoints/step-00000002").mkdir()
    Path("twice/finished.json").write_text("{}")
    model.load("twice")  # checkpoints of a finished run, which a kill left
    assert not capsys.readouterr().out
    refused(lambda: merge.main([str(folder), "out"]), "the --out of an unfinished run")


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    """OUT/checkpoints is a link: what is in it goes, but for what is not ours; the link stays."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").symlink_to("../scratch")
    for name in ("step-00000001", "damaged-step-00000002", "removed-step-00000003", "part"):
        (tmp_path / "scratch" / name).mkdir()
    for name in ("lock", "others.txt"):
        (tmp_path / "scratch" / name).write_text("x")
    checkpoint.remove_checkpoints(tmp_path / "out")
    equal(os.listdir(tmp_path / "scratch"), ["others.txt"], "remove_checkpoints")
    assert (tmp_path / "out" / "checkpoints").is_symlink()
    plain = tmp_path / "out2"
    (plain / "checkpoints" / "step-00000001").mkdir(parents=True)
    checkpoint.remove_checkpoints(plain)
    equal(os.listdir(plain), [], "an ordinary folder goes, too")


def test_a_run_goes_on_where_its_model_and_data_were_moved():
    """Their digests say that they are the same; where there is none, the name counts."""
    cfg = contrastive.Config(model="new/m", data="new/l.jsonl")
    cfg.model_digest, cfg.data_digest = "abc", 7
    flags = checkpoint.written_state(cfg, 1)["config"]
    old = {**flags, "model": "old/m", "data": "old/l.jsonl"}
    checkpoint.refuse_another_run(checkpoint.State(1, old, 1, {}), cfg)
    for other, says in (({"model_digest": "x"}, "model was 'old/m'"), ({"data_digest": 8}, "data")):
        state = checkpoint.State(1, {**old, **other}, 1, {})
        refused(lambda state=state: checkpoint.refuse_another_run(state, cfg), says)


# ----------------------------------------------------------------------------------- special files


def test_logs_and_small_json_files_are_never_opened_blindly(tmp_path):
    """A pipe was waited for, a device filled the memory."""
    os.mkfifo(tmp_path / "pipe.json")
    refused(lambda: compare_logs.read_log(tmp_path / "pipe.json"), "is a pipe")
    refused(lambda: compare_logs.read_log("/dev/zero"), "is a device")
    refused(lambda: read_json(tmp_path, "pipe.json"), "pipe.json: is a pipe")


# ------------------------------------------------------------------------------------- the machine


def said_by(main, tmp_path):
    """-> (status, what it printed to both streams) of main() in a fork."""
    fork = Fork(main, tmp_path / "out", tmp_path / "err")
    status = fork.wait()
    texts = [(tmp_path / name).read_text() for name in ("out", "err") if (tmp_path / name).exists()]
    return status, "".join(texts)


def test_a_closed_output_is_no_error_and_no_file_takes_its_place(tmp_path):
    """`>&-`: the next file would get number 1, and what a library prints would stand in it."""

    def main():
        os.close(1)
        sys.stdout = None
        start.open_streams()
        with open(tmp_path / "model", "wb") as file:
            assert file.fileno() > 2
            os.write(1, b"a library prints")
        ranks.say("a line")
        ending.watch_signals()
        ending.leave(status=3)

    equal((said_by(main, tmp_path), (tmp_path / "model").read_bytes()), ((3, ""), b""), "1")


def test_letters_that_a_terminal_does_not_have_are_spelled_out(tmp_path):
    def main():
        sys.stdout = open(1, "w", encoding="ascii", closefd=False)
        start.open_streams()
        print("no such picture: rött 🐶.png ± 1", flush=True)

    want = "no such picture: r\\xf6tt \\U0001f436.png \\xb1 1\n"
    equal(said_by(main, tmp_path), (0, want), "errors=backslashreplace")


def test_a_full_disk_under_the_output_costs_lines_and_no_run(tmp_path):
    """`python contrastive.py > log.txt`: it goes on, and says at its end that lines are lost."""

    def main():
        sys.stdout = open("/dev/full", "w", buffering=1)
        ending.watch_signals()
        ranks.say("step 1")
        ranks.say("step 2")
        Path(tmp_path, "saved").touch()
        ending.leave()

    status, said = said_by(main, tmp_path)
    assert status == 1 and (tmp_path / "saved").exists(), said
    equal(said.count("\n"), 1, said)
    assert "not all that it printed is there: No space left on device" in said, said


def test_any_full_disk_is_one_line():
    """Of what prints by itself, too."""
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        assert os.strerror(number) in ranks.known_reason(OSError(number, os.strerror(number)))
    equal(ranks.known_reason(OSError(errno.EIO, "x")), "", "others are unexpected")


def test_a_working_folder_that_is_gone_is_said(tmp_path, monkeypatch):
    """PyTorch would end the process with a line about a library."""
    monkeypatch.chdir(tmp_path)
    assert start.has_working_folder()
    os.rmdir(tmp_path)
    assert not start.has_working_folder()


# ------------------------------------------------------------------------------------------ models


def test_a_processor_that_resizes_nothing_is_found_when_it_is_loaded(folder):
    """`"do_resize": null`: pictures of 64 x 64 pixels happened to fit, others were a traceback."""
    change(folder / "processor_config.json", image_processor__do_resize=None)
    refused(lambda: model.load(folder, device="cpu"), "processor_config.json", "reshape")


def test_a_processor_of_other_patches_or_of_infinite_pixels_is_found_when_it_is_loaded(folder):
    """Patches of one pixel: so many tokens that the trial picture was left out, and the first real
    one was a traceback. A black trial picture stays black, whatever it is multiplied with."""
    file = folder / "processor_config.json"
    whole = file.read_bytes()
    change(file, image_processor__patch_size=1)
    refused(lambda: model.load(folder, device="cpu"), "patch_size 1", "config.json patch_size 8")
    file.write_bytes(whole)
    change(file, image_processor__rescale_factor=1e18)
    refused(lambda: model.load(folder, device="cpu"), "not of length 1")


def test_a_row_beyond_what_the_model_was_made_for_is_refused(shared):
    """A book in one text: it took hours, or the memory. Positions count, not tokens: a picture's
    are fewer."""
    most = shared.mllm.config.get_text_config().max_position_embeddings
    refused(lambda: shared.encode(["a red thing " * most]), "--max-length 4096", f"{most:,}")
    refuse_longer(shared.mllm, torch.arange(most)[None])
    refused(
        lambda: refuse_longer(shared.mllm, torch.arange(most + 1)[None]), f"{most + 1:,} tokens"
    )
    refuse_longer(shared.mllm, torch.zeros(3, 1, 2 * most, dtype=torch.long))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pair_beyond_what_the_model_was_made_for_costs_no_step_before_it(tmp_path, workers):
    """It is told by what it holds; --max-length, the way out, goes with --resume."""
    names, flags = "abcdefgh", ["--steps", "6", "--batch", "2", "--block", "2", "--seed", "1"]
    cfg = contrastive.Config.parse(flags)
    drawn = [{names[i] for _, i in contrastive.draw({"x": names}, cfg, step)} for step in range(6)]
    late = min(drawn[2] - drawn[0] - drawn[1])
    book = "a red thing " * 2048
    lines = []
    for x in names:
        lines.append({"query": {"text": book if x == late else x}, "target": {"text": x}})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    words = ["--data", str(tmp_path / "list.jsonl"), "--out", str(tmp_path / "out"), *flags]
    words += ["--model", "toy-random", "--workers", str(workers)]
    refused(
        lambda: contrastive.main(contrastive.Config.parse(words)),
        "a row of", "--max-length 4096", "a red thing", "--resume goes on from step-00000002",
    )  # fmt: skip
    words += ["--resume", "--max-length", "4096"]
    contrastive.main(contrastive.Config.parse(words))
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_input_beyond_what_the_model_was_made_for_is_named_and_costs_no_other(shared, workers):
    """Of ten thousand texts nobody knew which one it was, and with a list `bad`, too, all were
    lost."""
    small = shared.encode(["a", "b"])
    book = "a red thing " * shared.mllm.config.get_text_config().max_position_embeddings
    refused(lambda: shared.encode(["a", book], workers=workers), "input 1: a row of", "a red thing")
    bad = []
    z = shared.encode(["a", book, "b"], workers=workers, bad=bad)
    assert np.isnan(z[1]).all() and len(bad) == 1 and "input 1: a row of" in bad[0], bad
    assert abs(z[[0, 2]] - small).max() < 1e-6, "the others"


def test_threads_that_encode_do_not_wake_each_other_s_dropout(embedder):
    """The first that was through put the module back into training mode under the others."""
    embedder.train()
    modes = [part.training for part in embedder.modules()]
    seen, first_is_in, second_is_in = [], threading.Event(), threading.Event()

    class Slow:
        def __iter__(self):
            first_is_in.set()
            second_is_in.wait(60)
            return iter(["a"])

    thread = threading.Thread(target=lambda: embedder.encode(Slow()))
    thread.start()
    first_is_in.wait(60)

    class Second:
        def __iter__(self):
            second_is_in.set()
            thread.join(60)  # the first is through
            seen.append(any(part.training for part in embedder.modules()))
            return iter(["b"])

    assert np.isfinite(embedder.encode(Second())).all()
    equal(seen, [False], "evaluating")
    equal([part.training for part in embedder.modules()], modes, "and it comes back")


def test_models_may_be_loaded_in_several_threads(tmp_path):
    """Each said that the other one's folder was damaged; and torch.nn.init did nothing from then
    on, in the whole process. (In a process of its own, which may be left so.)"""
    said = tmp_path / "said"

    def load_again(want, seen):
        try:
            seen.append(float(abs(model.load("toy").encode(["a red circle"]) - want).max()))
        except InputError as e:
            seen.append(e)

    def main():
        want, seen = model.load("toy").encode(["a red circle"]), []
        fill = torch.nn.init.normal_
        threads = [threading.Thread(target=load_again, args=(want, seen)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(seen, torch.nn.init.normal_ is fill)

    equal(Fork(main, said).wait(), 0, said.read_text())
    equal(said.read_text(), "[0.0, 0.0, 0.0, 0.0] True\n", "the same vectors, and torch as it was")


@pytest.mark.parametrize("path", [None, 5, "", " ", b"x"])
def test_a_model_is_saved_into_a_folder_that_has_a_name(embedder, path):
    refused(lambda: model.save(embedder, path), "is saved into a folder", "names none")
