"""Searching a folder: the best pictures first, an index that is never of another model."""

import copy
import dataclasses
import json
import os
import shutil
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import threads
import torch
from checks import equal, expect, shorten, toy
from forked import on_ranks, said_on
from PIL import Image

import model
from data import Item
from plumbing.errors import InputError
from plumbing.formats import IMAGE
from plumbing.ranks import rank
from tools import search
from toy.world import Shapes


@pytest.fixture
def folder(tmp_path):
    """Twelve toy pictures, two of them in a folder below, with a name that is not ASCII."""
    top = tmp_path / "pictures"
    (top / "unter ordner").mkdir(parents=True)
    for i in range(12):
        name = f"unter ordner/{i} \u732b.png" if i > 9 else f"{i}.PNG"
        (_, (scene,)), *_ = Shapes().dialogue(i)
        scene.render().save(top / name, format="png")
    return top


def run(folder, embedder, capsys, **flags):
    """A search with an embedder. -> what it printed."""
    out = str(folder.parent / "found.png")
    cfg = search.Config(images=str(folder), out=out, **flags)
    search.search(embedder, cfg)
    return capsys.readouterr().out


def indices(folder):
    return sorted(folder.parent.glob("*.npz"))


def test_the_nearest_pictures_come_first_and_are_drawn(folder, shared, capsys):
    """A picture finds itself, with cosine 1; the order is that of the cosines; a sheet is drawn."""
    said = run(folder, shared, capsys, query_image=str(folder / "3.PNG"), top=5)
    assert "12 pictures" in said and "12 of them new" in said
    rows = []
    for line in said.splitlines():
        score, _, name = line.strip().partition("  ")
        if name.startswith(str(folder)):
            rows.append((float(score), name))
    assert len(rows) == 5 and rows == sorted(rows, key=lambda r: -r[0])
    assert rows[0] == (1.0, str(folder / "3.PNG"))
    z = shared.encode([Item(IMAGE, (folder / "3.PNG",)), Item(IMAGE, (rows[1][1],))])
    assert rows[1][0] == pytest.approx(float(z[0] @ z[1]), abs=1e-4)
    sheet = np.asarray(Image.open(folder.parent / "found.png"))
    assert sheet.shape == (30 + 2 * 260, 4 * 240, 3) and (sheet[40:200, 20:200] != 255).any()


def test_only_new_and_changed_files_are_embedded_again(folder, shared, capsys, monkeypatch):
    """Nothing the second time; then a changed, a new and a lost file."""
    embedded = []
    encode = model.Embedder.encode
    monkeypatch.setattr(
        model.Embedder,
        "encode",
        lambda self, items, *a: embedded.append(len(items)) or encode(self, items, *a),
    )
    want = run(folder, shared, capsys, text="a red circle")
    again = run(folder, shared, capsys, text="a red circle")
    assert embedded == [1, 12, 1], embedded
    assert want.splitlines()[1:] == again.splitlines()[1:]
    Image.new("RGB", (64, 64), "red").save(folder / "0.PNG")
    os.utime(folder / "0.PNG", ns=(1, 1))
    Image.new("RGB", (64, 64), "blue").save(folder / "new.jpg")
    (folder / "1.PNG").unlink()
    said = run(folder, shared, capsys, text="a red circle", top=20)
    assert embedded[3:] == [1, 2], embedded
    assert "12 pictures" in said and "2 of them new" in said and "1.PNG" not in said


def test_all_ranks_embed_the_pictures_that_rank_0_has_seen(folder, shared, tmp_path, monkeypatch):
    """Each would list the folder in its own time, and a picture may come in between: of lists that
    are not the same a picture would get another one's vector, and the index keep it."""
    listed = search.list_files

    def list_files(*args):
        paths = listed(*args)
        return dict([*paths.items()][rank() :])  # rank 1 comes too late for one that was removed

    monkeypatch.setattr(search, "list_files", list_files)
    cfg = search.Config(images=str(folder), out=str(tmp_path / "found.png"), text="a")
    _, want = search.index_pictures(shared, cfg)
    for index in indices(folder):
        index.unlink()

    def main():
        torch.distributed.init_process_group("gloo")
        paths, z = search.index_pictures(shared, cfg)
        assert len(paths) == len(want) and np.allclose(z, want, atol=1e-5)

    equal(on_ranks(2, main, tmp_path), [0, 0], said_on(tmp_path))


def test_an_index_of_another_model_is_never_used(folder, shared, capsys):
    """Another weight (a single bit), prompt, pooling, K, pixel range, instruction: another key."""
    keys = {search.fingerprint(shared)}
    assert search.fingerprint(shared) in keys and search.fingerprint(shorten(toy())) in keys
    bit = shorten(toy())
    weight = bit.mllm.get_output_embeddings().weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    swapped = shorten(toy())
    rows = swapped.mllm.get_input_embeddings().weight.data
    rows[[5, 6]] = rows[[6, 5]]
    settings = [{}, dict(pooling="last"), dict(prompt="coma"), dict(compress_tokens=2)]
    settings += [dict(max_pixels=2048), dict(min_pixels=2048), dict(max_length=50)]
    # As the other kind of image processor does where torchvision is installed.
    resized = shorten(toy())
    resized.processor.image_processor = copy.copy(resized.processor.image_processor)
    resized.processor.image_processor.__class__ = type(
        "Other", (type(shared.processor.image_processor),), {}
    )
    # With the same weights: another configuration, tokenizer, adapter.
    norm, words, scaled = shorten(toy()), shorten(toy()), shorten(toy())
    norm.mllm.config = copy.deepcopy(norm.mllm.config)
    norm.mllm.config.text_config.rms_norm_eps = 0.5
    words.processor.tokenizer = copy.deepcopy(words.processor.tokenizer)
    words.processor.tokenizer.add_tokens(["another"])
    noted = {"lora_alpha": 9, "target_modules": {"q", "k"}, "base_model_name_or_path": "there"}
    adapter = SimpleNamespace(active_peft_config=SimpleNamespace(to_dict=lambda: dict(noted)))
    object.__setattr__(scaled, "adapter", adapter)
    others = [bit, swapped, resized, norm, words, scaled]
    for flags in settings:
        others.append(model.load("toy-random", **dict(compress_tokens=4) | flags, device="cpu"))
    for other in others:
        keys.add(search.fingerprint(other))
    keys.add(search.fingerprint(shared, "<image> Represent the picture."))
    assert len(keys) == 2 + len(others), "two of them have one key"
    key = search.fingerprint(scaled)
    noted["base_model_name_or_path"] = "elsewhere"  # it was moved
    equal(search.fingerprint(scaled), key, "a folder that was moved")
    run(folder, shared, capsys, text="a red circle")
    said = run(folder, bit, capsys, text="a red circle")
    assert "12 of them new" in said and len(indices(folder)) == 2


def test_a_changed_checkpoint_in_the_same_folder_is_noticed(folder, tmp_path, capsys):
    """Train, search, train again into the same folder, search: nothing of the first is used."""
    place, embedder = tmp_path / "m", toy()
    model.save(embedder, place)
    run(folder, model.load(place, device="cpu"), capsys, text="two")
    assert "0 of them new" in run(folder, model.load(place, device="cpu"), capsys, text="two")
    embedder.mllm.get_input_embeddings().weight.data[7] += 0.1
    model.save(embedder, place)
    assert "12 of them new" in run(folder, model.load(place, device="cpu"), capsys, text="two")


def test_a_broken_picture_is_named_and_left_out(folder, shared, capsys):
    """The others are found; the next search names it again."""
    (folder / "broken.png").write_bytes(b"nothing")
    for _ in range(2):
        said = run(folder, shared, capsys, text="two", top=99)
        assert "left out:" in said and "broken.png (7 bytes): not a readable" in said
        assert sum(str(folder) in s and s[0] in " 01-" for s in said.splitlines()) >= 12


def test_a_cut_off_index_is_made_again(folder, shared, capsys):
    """It is written beside and renamed; what is damaged otherwise is not believed."""
    run(folder, shared, capsys, text="two")
    (index,) = indices(folder)
    index.write_bytes(index.read_bytes()[:-200])
    assert "12 of them new" in run(folder, shared, capsys, text="two")


def other_width(path, files, z):
    np.savez(path, files=files, z=z[:, :7])


def other_numbers(path, files, z):
    np.savez(path, files=files, z=z.astype(str))


def of_three_axes(path, files, z):
    np.savez(path, files=files, z=z[:, None])


def not_finite(path, files, z):
    np.savez(path, files=files, z=np.full_like(z, np.nan))


def of_no_length(path, files, z):
    np.savez(path, files=files, z=np.zeros_like(z))


def fewer_rows(path, files, z):
    np.savez(path, files=files, z=z[:-1])


def files_in_a_table(path, files, z):
    np.savez(path, files=np.array([["a"]] * len(z)), z=z)


def a_plain_array(path, files, z):
    with open(path, "wb") as file:
        np.save(file, z)


@pytest.mark.parametrize(
    "damage",
    [other_width, other_numbers, of_three_axes, not_finite, of_no_length, fewer_rows,
     files_in_a_table, a_plain_array],
)  # fmt: skip
def test_an_index_of_anything_else_is_made_again(folder, shared, capsys, damage):
    """It was a traceback, or a ranking by NaN; now all pictures are embedded, and found."""
    want = run(folder, shared, capsys, text="two")
    (index,) = indices(folder)
    with np.load(index) as old:
        files, z = old["files"], old["z"]
    damage(index, files, z)
    assert search.read_index(index, shared.dim) == {}
    said = run(folder, shared, capsys, text="two")
    assert "12 of them new" in said and said.splitlines()[1:] == want.splitlines()[1:]


class Mark:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["files", "z"])
def test_nothing_in_an_index_is_unpickled(tmp_path, name):
    """It lies beside the pictures, where somebody else may have put it."""
    index, mark = tmp_path / "i.npz", tmp_path / "ran"
    arrays = dict(files=np.frombuffer(b'["a"]', np.uint8), z=np.ones((1, 1), np.float32))
    np.savez(index, **arrays)
    equal(list(search.read_index(index, 1)), ["a"], "negative control: an index")
    np.savez(index, **arrays | {name: np.array([Mark(mark)], object)})
    equal(search.read_index(index, 1), {}, "search.read_index")
    assert not mark.exists(), "code of the index was run"


@pytest.mark.parametrize("factor", [np.nan, 0.5])
def test_a_row_of_an_index_that_is_no_embedding_costs_that_picture_alone(
    folder, shared, capsys, factor
):
    """NaN, or of another length than 1: its cosine would be half of what it is."""
    run(folder, shared, capsys, text="two")
    (index,) = indices(folder)
    with np.load(index) as old:
        files, z = old["files"], old["z"]
    z[5] *= factor
    np.savez(index, files=files, z=z)
    assert " 1 of them new" in run(folder, shared, capsys, text="two")


def test_a_pipe_in_the_index_s_place_is_not_waited_for(folder, shared, capsys):
    """Its opening would wait for a writer for ever; the search says so, and finds."""
    pipe = folder.parent / f"pictures.index-{search.fingerprint(shared, IMAGE)}.npz"
    os.mkfifo(pipe)
    ending = threading.Timer(20, lambda: os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)))
    ending.start()  # else a search that waits would wait for ever
    try:
        said = run(folder, shared, capsys, text="two")
        assert ending.is_alive(), "it waited for the pipe"
    finally:
        ending.cancel()
    assert "the index" in said and "no ordinary file" in said and "wrote " in said, said
    assert pipe.is_fifo(), "it stays"


def spoil(monkeypatch, is_bad):
    """Makes the embeddings of some Items NaN, as damaged weights do."""
    encode = model.Embedder.encode

    def spoiled(self, items, *args):
        z = encode(self, items, *args)
        z[[bool(is_bad(item)) for item in items]] = np.nan
        return z

    monkeypatch.setattr(model.Embedder, "encode", spoiled)


@pytest.mark.parametrize("query", [dict(text="two"), dict(query_image="3.PNG")])
def test_a_query_whose_embedding_is_not_finite_finds_nothing(folder, shared, monkeypatch, query):
    """Every cosine was NaN, and printed as a result."""
    monkeypatch.chdir(folder)
    spoil(monkeypatch, lambda item: True)
    cfg = search.Config(images=".", model="m", out="../found.png", **query)
    asked = next(iter(query.values()))
    with pytest.raises(InputError, match=f"'{asked}': its embedding by --model m is not finite"):
        search.search(shared, cfg)
    assert not (folder.parent / "found.png").exists() and not indices(folder)


def test_what_is_left_out_is_not_said_before_it_is_listed(folder, capsys):
    """Or a link to a folder would be named twice: the look at the flags finds it, too."""
    (folder / "linked").symlink_to(folder.parent)
    cfg = search.Config(images=str(folder), text="two", out=str(folder.parent / "found.png"))
    search.refuse_no_search(cfg)
    equal(capsys.readouterr().out, "", "search.refuse_no_search")
    search.list_files(folder, cfg.out, [])
    equal(capsys.readouterr().out, "left out: linked: a link to a folder\n", "search.list_files")


def test_a_picture_whose_embedding_is_not_finite_is_named_and_left_out(
    folder, shared, capsys, monkeypatch
):
    """Each time; one that cannot be read is named once, as ever."""
    (folder / "broken.png").write_bytes(b"nothing")
    spoil(monkeypatch, lambda item: item.images and item.images[0].endswith("3.PNG"))
    for _ in range(2):
        said = run(folder, shared, capsys, text="two", top=99)
        assert f"left out: {folder / '3.PNG'}: its embedding is not finite\n" in said, said
        assert said.count("left out:") == 2 and said.count("broken.png") == 1, said
        assert "nan" not in said.replace("nanocoma", ""), said


def test_a_picture_whose_row_is_too_long_is_named_once(folder, shared):
    """It has no embedding, and so none that is not finite."""
    text = "a " * shared.mllm.config.get_text_config().max_position_embeddings
    items = [Item(IMAGE, (str(folder / "2.PNG"),)), Item(IMAGE + text, (str(folder / "3.PNG"),))]
    errors = []
    z = search.embed_pictures(shared, items, search.Config(workers=0), "", errors)
    equal(np.isfinite(z).all(1).tolist(), [True, False], "of the other one")
    equal((len(errors), errors[0].count("a row of"), "3.PNG" in errors[0]), (1, 1, True), errors)


def test_no_index_is_left_of_pictures_that_cannot_be_embedded(folder, shared, monkeypatch):
    """Each is named, and nothing is written."""
    spoil(monkeypatch, lambda item: item.images)
    with pytest.raises(InputError, match="none of its pictures could be embedded"):
        search.search(shared, search.Config(images=str(folder), text="two"))
    assert not indices(folder)


def test_what_cannot_be_searched_is_said(tmp_path, shared):
    """No folder, no pictures, no query."""
    for images, says in ((tmp_path, "no pictures in it"), (tmp_path / "nothing", "no such folder")):
        with pytest.raises(InputError, match=says):
            search.search(shared, search.Config(images=str(images), text="x"))
    for flags in (dict(images=str(tmp_path)), dict(text="two")):
        with pytest.raises(InputError, match="a search needs --images"):
            search.main(search.Config(model="toy-random", **flags))


def test_the_command_line_searches(folder, tmp_path, capsys, monkeypatch):
    """From flags to a sheet; a text and a picture together are one query."""
    monkeypatch.chdir(tmp_path)
    words = ["--images", str(folder), "--model", "toy-random", "--workers", "0", "--top", "2"]
    search.main(search.Config.parse([*words, "--query-image", str(folder / "3.PNG")]))
    said = capsys.readouterr().out
    assert "searching with toy-random" in said and f" 1.0000  {folder / '3.PNG'}" in said, said
    assert "wrote out/search.png" in said and (tmp_path / "out" / "search.png").exists()
    both = search.Config.parse([*words, "--query-image", "x.png", "--text", "what is it?"])
    query = search.query_of(both)
    assert query == Item(f"{IMAGE} what is it?", ("x.png",)), query


def test_its_own_picture_and_index_are_not_found_where_the_folder_is_the_working_folder(
    folder, shared, capsys, monkeypatch
):
    """`--images .`, three times: the sheet and the index of the first are no pictures of it."""
    monkeypatch.chdir(folder)
    for images in (".", "./", "unter ordner/.."):
        cfg = search.Config(images=images, text="two", out="out/search.png", top=20)
        search.search(shared, cfg)
        said = capsys.readouterr().out
        assert "12 pictures in" in said and "search.png\n" in said, said
        assert said.count(".PNG") + said.count("\u732b") == 12 and said.count("search.png") == 1, (
            said
        )
    assert len(indices(folder)) == 1 and not list(folder.glob("*.npz")), "beside it"
    assert "0 of them new" in said


@pytest.mark.parametrize("ending", ["PNG", "jpg", "webp", "tiff"])
def test_a_sheet_replaces_a_sheet_and_no_photograph(folder, shared, ending):
    """--out in the searched folder, there already: of an earlier search, or a user's."""
    cfg = search.Config(images=str(folder), text="two", out=str(folder / f"sheet.{ending}"))
    for _ in range(2):
        search.refuse_no_search(cfg)
        search.search(shared, cfg)
    Image.new("RGB", (8, 8)).save(cfg.out)
    with pytest.raises(InputError, match=f"--out .*sheet.{ending}: is a file of .*would be lost"):
        search.refuse_no_search(cfg)


def test_a_search_that_cannot_be_is_refused_before_anything_is_loaded(folder, monkeypatch):
    """A picture that is not there (without a word of --image-root, which a search has not), a sheet
    of no kind, no folder, nothing asked."""
    monkeypatch.setattr(model, "load_for", pytest.fail)
    good = dict(images=str(folder), text="x", out=str(folder.parent / "x.png"))
    for flags, says in (
        (dict(query_image="gone.png"), "--query-image gone.png: no such picture$"),
        (dict(out="x.xyz"), "no kind of picture; end it with .png"),
        (dict(out="x"), "no kind of picture; end it with .png"),
        (dict(out="x.blp"), "no kind of picture; end it with .png"),
        (dict(images="gone"), "--images gone: no such folder"),
        (dict(image_text="a picture"), "--image-text 'a picture' has 0 <image>; one is wanted"),
        (dict(image_text="<image> <image>"), "--image-text .* has 2 <image>; one is wanted"),
        (dict(text="<|image_1|>"), "--query-image FILE puts"),
        (dict(text="<image>"), "--text '<image>' has <image>: --query-image FILE puts"),
        (dict(text=""), "a search needs --images"),
    ):
        with pytest.raises(InputError, match=says):
            search.main(search.Config(**good | flags))


def test_an_index_that_cannot_be_written_costs_nothing_but_itself(folder, shared, capsys):
    """Its name is taken by a folder: the search says so, and finds."""
    key = search.fingerprint(shared, IMAGE)
    (folder.parent / f"pictures.index-{key}.npz").mkdir()
    said = run(folder, shared, capsys, text="two", top=3)
    assert "the index" in said and "a folder" in said and "wrote " in said, said
    assert not list(folder.parent.glob(".*part*")), "nothing is left over"


def test_a_long_name_and_a_long_text_are_printed_in_200_characters(folder, shared, capsys):
    """The text is the sheet's title, too."""
    (folder / "3.PNG").rename(folder / f"{'x' * 240}.png")
    said = run(folder, shared, capsys, text="two " * 500, top=20)
    assert max(map(len, said.splitlines())) < 230 and "xxx\u2026" in said, said


def test_a_text_of_blanks_is_nothing_to_search_for():
    """It was embedded, and eight pictures were found for it."""
    with pytest.raises(InputError, match="needs --images DIR, and --text"):
        search.refuse_no_search(search.Config(images=".", text=" \n"))


def test_an_index_of_another_device_kernel_template_or_library_is_never_used(shared, monkeypatch):
    """A GPU computes in bfloat16; and what stands around a picture is a part of its vector. K, with
    the same weights: as nanocoma.json says it."""
    other = dataclasses.replace(shared.collate.template, after_text="\n")
    keys = [search.fingerprint(shared)]
    for place, name, value in (
        (model.Embedder, "device", torch.device("cuda")),
        (shared.mllm.config, "_attn_implementation", "eager"),
        (shared.collate, "template", other),
        (shared.collate, "max_length", 50),
        (shared, "K", 3),
        (shared, "style", "coma"),
        (search, "versions", lambda: {"torch": "0"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            keys.append(search.fingerprint(shared))
    equal(len(set(keys)), 8, f"keys that differ: {keys}")
    equal(search.fingerprint(shared), keys[0], "put back")


def test_a_file_is_the_same_while_its_size_and_its_time_are(tmp_path):
    """Either alone makes it another one."""
    file, seen = tmp_path / "a.png", []
    for size, time in ((3, 1), (3, 2), (4, 2), (4, 2)):
        file.write_bytes(b"x" * size)
        os.utime(file, ns=(time, time))
        seen += search.list_files(tmp_path, "x.png", [])
    times = [name.split("|")[1:3] for name in seen]
    equal((len(set(map(tuple, times))), times[2]), (3, times[3]), f"files of these names: {seen}")


def test_a_picture_that_is_removed_meanwhile_is_left_out(tmp_path, monkeypatch):
    """Between its name and its size; the others are searched."""
    (tmp_path / "a.png").touch()
    monkeypatch.setattr(search, "find_pictures", lambda folder: ["gone.png", "a.png"])
    errors = []
    paths = search.list_files(tmp_path, "x.png", errors)
    equal(list(paths.values()), ["a.png"], "search.list_files")
    equal(errors, [f"{tmp_path / 'gone.png'}: No such file or directory"], "left out")


def test_two_pictures_of_one_size_and_time_may_change_their_names(folder, shared, capsys):
    """As a zip file leaves them: else each is found by what the other one shows."""
    for name, colour in (("a.bmp", "red"), ("b.bmp", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / name)
        os.utime(folder / name, ns=(1, 1))
    run(folder, shared, capsys, text="two")
    (folder / "a.bmp").rename(folder / "t")
    (folder / "b.bmp").rename(folder / "a.bmp")
    (folder / "t").rename(folder / "b.bmp")
    said = run(folder, shared, capsys, query_image=str(folder / "b.bmp"), top=1)
    assert "2 of them new" in said and f" 1.0000  {folder / 'b.bmp'}\n" in said, said


def test_a_long_name_costs_an_index_its_own_length(folder, shared, capsys):
    """And not as much for each of the others, as in an array of texts."""
    name = "x" * 200 + ".bmp"
    Image.new("RGB", (64, 64), "red").save(folder / name)
    run(folder, shared, capsys, text="two")
    (index,) = indices(folder)
    with np.load(index) as kept:
        names = json.loads(kept["files"].tobytes())
        assert kept["files"].nbytes < 3 * 200 + 100 * len(names), kept["files"].nbytes
    assert sum(x.startswith(name) for x in names) == 1, names


def test_a_picture_keeps_its_own_vector_when_others_change_and_come(folder, shared, capsys):
    """A changed and a new one stand first in the folder, and last in the index."""
    run(folder, shared, capsys, text="two")
    for name in ("0.PNG", "00.png"):
        Image.new("RGB", (64, 64), "red").save(folder / name)
    said = run(folder, shared, capsys, query_image=str(folder / "5.PNG"), top=1)
    assert "2 of them new" in said and f" 1.0000  {folder / '5.PNG'}\n" in said, said


@pytest.mark.parametrize(
    ("cost", "kept"), [(100.0, [4, 12]), (0.6, [4, 12]), (0.4, [4, 8, 12]), (0.1, [4, 8, 12])]
)
def test_an_index_is_kept_on_the_way_and_whole_in_the_end(folder, shared, monkeypatch, cost, kept):
    """Three windows of four pictures, of 10 s each; where writing would take more than a twentieth
    of that, not after each."""
    now, written = [1000.0], []

    def embed(embedder, items, cfg, progress, errors):
        now[0] += 10
        return np.eye(len(items), shared.dim, dtype=np.float32)

    def write(store, known):
        written.append(len(known))
        now[0] += cost

    monkeypatch.setattr(search, "WINDOW", 4)
    monkeypatch.setattr(search, "embed_pictures", embed)
    monkeypatch.setattr(search, "write_index", write)
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])
    search.index_pictures(shared, search.Config(images=str(folder), text="two"))
    equal(written, kept, "pictures in the index, each time")


def test_pictures_are_embedded_with_the_instruction_that_is_asked_for(folder, shared, monkeypatch):
    """--image-text; another one makes other vectors, so that no index of the first is taken."""
    texts, encode = set(), model.Embedder.encode

    def noted(self, items, *args):
        texts.update(item.text for item in items)
        return encode(self, items, *args)

    monkeypatch.setattr(model.Embedder, "encode", noted)
    for asked in (f"{IMAGE} what is it?", f"{IMAGE} where is it?"):
        texts.clear()
        cfg = search.Config(images=str(folder), text="two", image_text=asked)
        search.index_pictures(shared, cfg)
        equal(texts, {asked}, "Item(cfg.image_text, ...), and the index's key")


def test_pictures_that_are_equally_near_come_in_the_order_of_the_folder(
    folder, shared, capsys, monkeypatch
):
    """On every machine. (Of sixteen or fewer even a sort that is not stable leaves the order.)"""
    q = shared.encode([Item("two")])[0]
    z = np.zeros((300, len(q)), np.float32)
    z[:, 0] = [np.sign(q[0]) if i % 2 else -np.sign(q[0]) for i in range(300)]
    names = [f"{i:03}.png" for i in range(300)]
    monkeypatch.setattr(search, "index_pictures", lambda *_: (names, z))
    monkeypatch.setattr(search, "open_image", lambda path: Image.new("RGB", (8, 8)))
    said = run(folder, shared, capsys, text="two", top=300)
    order = [int(x[-7:-4]) for x in said.splitlines() if f"  {folder}" in x]
    equal(order, [*range(1, 300, 2), *range(0, 300, 2)], "search.search: stable")


def test_the_end_of_a_long_name_stands_on_the_sheet(folder, shared, capsys, monkeypatch):
    """Thirty characters, the file's own among them: folders are many pictures'."""
    captions, name = [], "a folder of many pictures/and another one below it/7.png"
    z = shared.encode([Item("two")])
    monkeypatch.setattr(search, "index_pictures", lambda *_: ([name], z))
    monkeypatch.setattr(search, "open_image", lambda path: Image.new("RGB", (8, 8)))
    draw = search.draw_sheet
    monkeypatch.setattr(search, "draw_sheet", lambda *x: captions.extend(x[2]) or draw(*x))
    run(folder, shared, capsys, text="two")
    equal(captions, [f"1.000 {name[-30:]}"], "search.search")


def test_a_sheet_is_read_as_a_text_is():
    """Four in a row, the best first, then the next row."""
    colours = ["red", "lime", "blue", "yellow", "black", "cyan"]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = search.draw_sheet("title", pictures, [""] * len(colours))
    for n, picture in enumerate(pictures):
        row, column = divmod(n, 4)
        middle = (
            column * search.SIDE + search.SIDE // 2,
            search.HEAD + row * (search.SIDE + search.CAPTION) + search.SIDE // 2,
        )
        equal(sheet.getpixel(middle), picture.getpixel((0, 0)), colours[n])


def test_the_sheet_shows_what_is_printed_each_picture_over_its_own_cosine(
    folder, shared, capsys, monkeypatch
):
    """The best first, which is not the order of the folder."""
    drawn = []

    def draw_sheet(title, pictures, captions):
        drawn.extend(zip(pictures, captions, strict=True))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(search, "draw_sheet", draw_sheet)
    said = run(folder, shared, capsys, query_image=str(folder / "9.PNG"), top=4)
    rows = [x.strip().partition("  ") for x in said.splitlines() if f"  {folder}" in x]
    equal((len(rows), len(drawn), rows[0][2]), (4, 4, str(folder / "9.PNG")), said)
    for (cosine, _, path), (picture, caption) in zip(rows, drawn, strict=True):
        number, _, name = caption.partition(" ")
        expect(abs(float(number) - float(cosine)) < 1e-3, caption, cosine, "its cosine")
        equal(str(folder / name), path, "its name")
        equal(picture.tobytes(), Image.open(path).convert("RGB").tobytes(), f"pixels of {name}")


def test_a_picture_that_goes_after_it_was_indexed_costs_no_other_its_place_on_the_sheet(
    folder, shared, capsys, monkeypatch
):
    """It is named, and the others are drawn over their own cosines; where all are gone, a line."""
    drawn, index_pictures = [], search.index_pictures

    def draw_sheet(title, pictures, captions):
        drawn.extend(zip(pictures, captions, strict=True))
        return Image.new("RGB", (8, 8))

    def index_and_lose(names, *arguments):
        indexed = index_pictures(*arguments)
        for name in names:
            (folder / name).unlink()
        return indexed

    monkeypatch.setattr(search, "draw_sheet", draw_sheet)
    beside = shutil.copy(folder / "9.PNG", folder.parent / "asked.png")
    cfg = dict(query_image=str(beside), top=12)
    monkeypatch.setattr(search, "index_pictures", partial(index_and_lose, ["9.PNG"]))
    said = run(folder, shared, capsys, **cfg)
    assert f"not drawn: {folder / '9.PNG'}: no such picture" in said and "wrote" in said, said
    equal(len(drawn), 11, "all others are drawn")
    for picture, caption in drawn:
        path = folder / caption.partition(" ")[2]
        equal(picture.tobytes(), Image.open(path).convert("RGB").tobytes(), caption)
    rest = [str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()]
    monkeypatch.setattr(search, "index_pictures", partial(index_and_lose, rest))
    with pytest.raises(InputError, match=f"--images {folder}: nothing of what was found can be"):
        run(folder, shared, capsys, **cfg)


def test_a_sheet_that_is_too_high_for_its_kind_is_said(folder, shared, capsys, monkeypatch):
    """A thousand results are 65,000 pixels, and a WebP has 16,383."""
    monkeypatch.setattr(search, "index_pictures", lambda *_: (["0.PNG"], shared.encode(["two"])))
    monkeypatch.setattr(search, "draw_sheet", lambda *_: Image.new("RGB", (1, 16_400)))
    out = folder.parent / "x.webp"
    with pytest.raises(InputError, match="--out .*x.webp: .*; end it with .png"):
        search.search(shared, search.Config(images=str(folder), text="two", out=str(out)))
    assert not out.exists()


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2)])
def test_a_sheet_is_as_large_as_its_pictures(n, columns, rows):
    """No empty column, no empty row."""
    sheet = search.draw_sheet("", [Image.new("RGB", (8, 8))] * n, [""] * n)
    height = search.HEAD + rows * (search.SIDE + search.CAPTION)
    equal(sheet.size, (columns * search.SIDE, height), "search.draw_sheet")


def test_a_photograph_is_made_smaller_smoothly():
    """Of stripes that are finer than the sheet's pixels a grey is left, and no other stripes."""
    stripes = (np.indices((8, 4 * search.SIDE)).sum(0) % 2 * 255).astype(np.uint8)
    sheet = search.draw_sheet("", [Image.fromarray(stripes).convert("RGB")], [""])
    grey, *_ = sheet.getpixel((search.SIDE // 2, search.HEAD))
    expect(100 < grey < 155, grey, "127, or nearly", "Image.Resampling")


def test_the_title_is_read_above_all_and_a_caption_below_its_own_picture():
    """In black on white; here the second picture of five has one."""
    white = [Image.new("RGB", (64, 64), "white")] * 5
    sheet = search.draw_sheet("title", white, ["", "caption", "", "", ""])
    dark = np.asarray(sheet.convert("L")) < 100
    expect(dark[: search.HEAD, : search.SIDE].any(), "white", "some black", "the title")
    rows, columns = np.nonzero(dark[search.HEAD :])
    expect(len(rows) > 20, len(rows), "some black", "the caption")
    cell, side, below = (columns // search.SIDE, search.SIDE, search.CAPTION)
    equal(set(cell.tolist()), {1}, "the second column")
    expect(side - 10 <= rows.min() and rows.max() < side + below, rows, "below it", "draw_sheet")


def test_no_weight_of_a_large_matrix_is_left_out_of_the_fingerprint():
    """Summed in parts of 4 million numbers, of which a toy has one: in the first part and in the
    last one, at their beginning and at their end."""
    p = torch.zeros(2**22 + 3, dtype=torch.bfloat16)
    places, sums = (0, 1, 2**22 - 1, 2**22, 2**22 + 2), {search.weight_sum(p)}
    for i in places:
        other = p.clone()
        other[i] = 2.0
        sums.add(search.weight_sum(other))
    equal(len(sums), 1 + len(places), "each change is another sum")


def test_a_small_picture_grows_pixel_by_pixel():
    """A smoothed toy picture would be a blur."""
    picture = Image.new("RGB", (2, 1), "red")
    picture.putpixel((1, 0), (0, 0, 255))
    sheet = search.draw_sheet("", [picture], [""])
    size = search.SIDE - 10  # its longer side
    cell = sheet.crop((5, search.HEAD, 5 + size, search.HEAD + size // 2))
    colours = {colour for _, colour in cell.getcolors(2**16)}
    equal(colours, {(255, 0, 0), (0, 0, 255)}, "its own colours alone")


def test_the_last_stage_that_is_there_searches_alike_on_all_ranks(folder, tmp_path, monkeypatch):
    """Stage 2's model, else stage 1's, else the toy; its weights are compared before it is read,
    and after: a run that ends meanwhile may have put another model there."""
    monkeypatch.chdir(tmp_path)
    compared, after = [], []
    monkeypatch.setattr(search, "same_model", lambda name: compared.append(name) or "digest")
    monkeypatch.setattr(search, "refuse_replaced", lambda *args: after.append(args))
    monkeypatch.setattr(search, "search", lambda *_: None)
    monkeypatch.setattr(model, "load_for", lambda cfg, _: equal(cfg.model, compared[-1], "first"))
    for stage in ("toy", "out/pretrain", "out/contrastive"):
        if stage != "toy":
            (tmp_path / stage).mkdir(parents=True)
            (tmp_path / stage / "config.json").write_text("{}")
        search.main(search.Config(images=str(folder), text="two"))
        equal(compared[-1], stage, "weights.first_model")
        equal(after[-1], (stage, "digest"), "behind load_for")


def test_the_index_is_rank_0s_and_so_is_the_sheet(folder, shared, monkeypatch, capsys):
    """On another node there is none to read; and two that write would write into one file."""
    cfg = search.Config(images=str(folder), text="two", out=str(folder.parent / "x.png"))
    want, z = search.index_pictures(shared, cfg)
    read, written, drawn = search.read_index, [], []
    monkeypatch.setattr(search, "read_index", lambda *x: {} if rank() else read(*x))
    monkeypatch.setattr(search, "embed_pictures", lambda *_: pytest.fail("embedded again"))
    got = threads.on_ranks(monkeypatch, 2, lambda _: search.index_pictures(shared, cfg))
    equal([paths for paths, _ in got], [want] * 2, "read on rank 0")
    monkeypatch.setattr(search, "read_index", lambda *_: {})
    monkeypatch.setattr(search, "embed_pictures", lambda *_: z)
    monkeypatch.setattr(search, "write_index", lambda *_: written.append(rank()))
    threads.on_ranks(monkeypatch, 2, lambda _: search.index_pictures(shared, cfg))
    equal(written, [0], "write_index")
    monkeypatch.setattr(search, "index_pictures", lambda *_: (want, z))
    draw = search.draw_sheet
    monkeypatch.setattr(search, "draw_sheet", lambda *x: drawn.append(rank()) or draw(*x))
    monkeypatch.setattr(shared, "encode", lambda *_: z[:1])
    threads.on_ranks(monkeypatch, 2, lambda _: search.search(shared, cfg))
    equal(drawn, [0], "draw_sheet")


def test_the_place_of_the_sheet_is_looked_at_on_rank_0(folder, monkeypatch):
    """It draws; another node's disk may hold anything there."""
    looked = []
    monkeypatch.setattr(search, "refuse_place", lambda _: looked.append(rank()))
    cfg = search.Config(images=str(folder), text="two", out="x.png")
    threads.on_ranks(monkeypatch, 2, lambda _: search.refuse_no_search(cfg))
    equal(looked, [0], "search.refuse_no_search")


def test_a_sheet_of_a_kind_that_can_be_read_and_not_written_is_refused(folder, monkeypatch):
    """Before anything is embedded."""
    Image.registered_extensions()  # fills SAVE
    monkeypatch.delitem(Image.SAVE, "WEBP")
    with pytest.raises(InputError, match="no kind of picture; end it with .png"):
        search.refuse_no_search(search.Config(images=str(folder), text="x", out="x.webp"))


def test_the_sheet_of_an_earlier_search_is_none_of_the_pictures(tmp_path):
    """By whatever path --out names it."""
    for name in ("a.png", "sheet.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    paths = search.list_files(tmp_path, str(tmp_path / "sheet.png"), [])
    equal(list(paths.values()), ["a.png"], "search.list_files")


def test_a_photograph_beside_the_folder_is_none_of_it(tmp_path):
    """Though its name begins as the folder's does."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a-found.png")
    cfg = search.Config(images=str(tmp_path / "a"), out=str(tmp_path / "a-found.png"))
    search.refuse_photograph(cfg)


def test_a_wide_picture_stays_in_its_cell_of_the_sheet():
    """It is made as small as its longer side asks for."""
    sheet = search.draw_sheet("", [Image.new("RGB", (100, 20), "red")] * 2, ["", ""])
    y = search.HEAD + 10
    at = [sheet.getpixel((x, y)) for x in (search.SIDE - 10, search.SIDE - 2, search.SIDE + 10)]
    equal(at, [(255, 0, 0), (255, 255, 255), (255, 0, 0)], "search.draw_sheet")


def test_the_picture_that_is_searched_with_is_not_drawn_over(folder, tmp_path):
    """It lies in another folder than those that are searched."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    cfg = search.Config(images=str(folder), query_image=str(photo), out=str(photo))
    with pytest.raises(InputError, match="--out .*photo.png: would be written over what is read"):
        search.refuse_place(cfg)


def test_an_adapter_s_flags_read_alike_in_every_process():
    """A set has no order of its own: words in it come otherwise each time that Python begins."""
    read = []
    for names in ({0, 8}, {8, 0}):
        noted = {"a": names, "b": 1} if not read else {"b": 1, "a": names}
        config = SimpleNamespace(to_dict=lambda noted=noted: dict(noted))
        read.append(search.flags_of(SimpleNamespace(active_peft_config=config)))
    expect(list({0, 8}) != list({8, 0}), "one order", "two", "Python's sets of numbers")
    equal(read[0], read[1], "search.flags_of")


def test_a_weight_that_is_not_trained_counts_too():
    """Under an adapter all but its own are frozen."""
    frozen = shorten(toy()).requires_grad_(False)
    key = search.fingerprint(frozen)
    weight = frozen.mllm.get_output_embeddings().weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    expect(search.fingerprint(frozen) != key, key, "another", "search.fingerprint")
