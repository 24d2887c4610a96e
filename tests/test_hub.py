"""Hub ids, with the real huggingface_hub in a process of its own and a small hub on 127.0.0.1."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import families
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from checks import close, equal, expect
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image

import model
from plumbing import hub as hub_room
from plumbing.config import TrainingFlags

SHA = "0123456789" * 4
CHILD = """import contextlib, io, json, pathlib, sys, time
sys.path.append("tests")
import torch.distributed as dist
import data, forked, model
from plumbing import errors, hub, ranks

def on_two_ranks(folder):
    place = pathlib.Path(folder)
    return forked.on_ranks(2, fetch_slowly, place), forked.said_on(place)

def fetch_slowly():
    ranks.PATIENCE = ranks.timedelta(seconds=3)
    ranks.setup()
    here, was = ranks.rank(), hub.fetch_here
    def slow(*words):
        assert here == 0, "only the first rank of a node asks the hub"
        time.sleep(4 if words[0] == "team/ranks" else 0)
        return was(*words)
    hub.fetch_here = slow
    for name in ("team/ranks", "team/nowhere"):
        try:
            pairs = data.read_pairs(name, subsets="A")
            print(f"rank {here}: {len(pairs['A'])} pairs", flush=True)
        except ValueError as e:
            print(f"rank {here}: {e}", flush=True)
    dist.barrier()

for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            value = eval(line)
        except errors.InputError as e:
            value = f"InputError: {e}"
    print(json.dumps([value, said.getvalue()]), flush=True)
"""


class Answer(BaseHTTPRequestHandler):
    """What snapshot_download asks a hub: the state of a repository, its list of files, a file."""

    def do_GET(self):
        at = re.match("(?:/api)?/(.*)/(revision|tree|resolve)/[^/?]*/?([^?]*)", self.path)
        repo, asked, path = at.groups() if at else ("", "", "")
        files = self.server.repos.get(repo if repo.count("/") == 2 else f"models/{repo}")
        trouble = self.server.trouble.items()
        wrong = next((v for k, v in trouble if k in f"{self.command} {self.path}"), None)
        status, head, body, cut = 200, {"X-Repo-Commit": SHA}, b"", None
        if wrong == "mute":
            return
        if files is None or isinstance(wrong, tuple):
            status, head["X-Error-Code"] = wrong or (404, "RepoNotFound")
            if status == 429:
                head["Retry-After"] = 1
                self.server.refusals -= 1
                self.server.trouble = self.server.trouble if self.server.refusals else {}
        elif asked == "resolve":
            body, start, cut = files[path], self.headers["Range"], wrong
            head["ETag"] = f'"{repo}-{path}"'.replace("/", "-")
            if start:
                status, size, body = 206, len(body), body[int(start[6:-1]) :]
                head["Content-Range"] = f"bytes {start[6:]}{size - 1}/{size}"
            if self.command == "GET":
                self.server.sent.append((path, start, len(body[:cut])))
        else:
            tree = [dict(type="file", path=f, size=len(b), oid=SHA) for f, b in files.items()]
            state = dict(id=repo, sha=SHA, siblings=[dict(rfilename=f) for f in files])
            body = json.dumps(tree if asked == "tree" else state).encode()
        self.send_response(status)
        head["Content-Length"] = len(body)
        for k, v in head.items():
            self.send_header(k, v)
        self.end_headers()
        if cut:
            self.server.trouble = {}
        if self.command == "GET":
            self.wfile.write(body[:cut])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class Hub(ThreadingHTTPServer):
    """repos: {"datasets/team/set": {path: bytes}}; trouble: {part of "GET /address": (status,
    X-Error-Code), "mute", or bytes until the first cut}; sent: (path, Range, number of bytes) of
    the files since the last ask()."""

    def __init__(self, home):
        super().__init__(("127.0.0.1", 0), Answer)
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.repos, self.trouble, self.sent, self.log = {}, {}, [], home / "stderr"
        self.home, self.refusals = home, 0  # how many 429 are still to come
        self.url = f"http://127.0.0.1:{self.server_port}"
        env = {k: v for k, v in os.environ.items() if not re.match("(?i)hf_|hugg|rank$|.*proxy", k)}
        env["HF_ENDPOINT"], env["HF_HOME"] = self.url, str(home)
        env["HF_HUB_DISABLE_XET"] = env["HF_HUB_DISABLE_TELEMETRY"] = "1"
        env["TQDM_POSITION"] = "-1"  # bars without a terminal
        self.env = env
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=env,
            cwd=Path(model.__file__).parent,
            text=True,
        )

    def ask(self, expression):
        """-> [its value in the child, or "InputError: ..."; what was printed]."""
        self.sent.clear()
        print(expression, file=self.child.stdin, flush=True)
        line = self.child.stdout.readline()
        expect(line, self.log.read_text()[-3000:], "a value or an InputError", expression)
        return json.loads(line)

    def files(self):
        return sorted(path for path, *_ in self.sent)


def table(**columns):
    file = io.BytesIO()
    pq.write_table(pyarrow.table(columns), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """With a data set under many names; its zips are larger than the library's chunks, 10 MiB."""
    hub, picture, archive = Hub(tmp_path_factory.mktemp("home")), io.BytesIO(), io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture, "bmp")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("A/x.bmp", picture.getvalue())
    q = dict(qry=["<|image_1|> q"], qry_image_path=["A/x.bmp"], pos_text=["t"], pos_image_path=[""])
    files = {f"{n}/{split}-0.parquet": table(**q) for n in "AB" for split in ("original", "other")}
    files |= {f"images_zip/{n}.zip": archive.getvalue() for n in "AB"}
    row = dict(qry_text=["q"], qry_img_path=[""], tgt_text=[["t", "u"]], tgt_img_path=[["", ""]])
    files |= {f"{n}/test-0.parquet": table(**row) for n in "AB"}
    for name in "set eval here cut half busy ranks gated denied token down mute typo".split():
        hub.repos[f"datasets/team/{name}"] = files
        hub.repos[f"models/team/{name}"] = {"model.safetensors": b"#"}
    yield hub
    hub.shutdown()
    hub.server_close()
    hub.child.stdin.close()
    hub.child.wait()


PAIRS = "[p.query.images[0].render().size for p in data.read_pairs('team/{}', subsets='{}')['A']]"
READ, LIST, ZIP = [[2048, 2048]], "A/original-0.parquet", "images_zip/A.zip"


def test_of_a_data_set_what_is_asked_for_is_fetched_and_nothing_twice(hub):
    """The lists and pictures of a subset, with a bar; the second time no file is asked for."""
    equal(hub.ask(PAIRS.format("set", "A:1")), [READ, "team/set: 0.01 GB to download\n"], "size")
    equal(hub.files(), [LIST, ZIP], "wanted")
    expect("Fetching 2 files: 100%" in hub.log.read_text(), "no bar", "one", "hub.announce")
    equal(hub.ask(PAIRS.format("set", "A")), [READ, "team/set: all here\n"], "the cache")
    equal(hub.files(), [], "nothing twice")
    equal(hub.ask("list(data.read_pairs('team/set'))")[0], ["A", "B"], "no subsets: all there are")
    equal(hub.files(), [x.replace("A", "B") for x in (LIST, ZIP)], "what is not here yet")
    tasks = "[(t.name, len(t.queries)) for t in data.read_tasks('team/eval', subsets='B')]"
    equal(hub.ask(tasks), [[["B", 1]], "team/eval: 0.01 GB to download\n"], "read_tasks")
    equal(hub.files(), ["B/test-0.parquet", "images_zip/B.zip"], "wanted")


def test_a_cut_connection_goes_on_where_it_was(hub):
    """The library asks for what is missing: at once, or (its older versions) the next time."""
    hub.trouble, sent = {f"GET /datasets/team/cut/resolve/{SHA}/{ZIP}": 11 * 2**20}, []
    for _ in range(2):
        got, _ = hub.ask(PAIRS.format("cut", "A"))
        sent += [x for x in hub.sent if x[0] == ZIP]
        if got == READ:
            break
    kept, size = 10 * 2**20, len(hub.repos["datasets/team/cut"][ZIP])  # kept: whole chunks
    want = [(ZIP, None, 11 * 2**20), (ZIP, f"bytes={kept}-", size - kept)]
    equal([got, sent], [READ, want], "(file, Range, bytes sent)")


def test_a_failure_costs_no_whole_file(hub):
    """Of two files one fails, after the size was said; then it alone is fetched again."""
    hub.trouble = {f"GET /datasets/team/half/resolve/{SHA}/{ZIP}": (500, "")}
    got, said = hub.ask(PAIRS.format("half", "A"))
    expect("500 Internal Server Error" in str(got), got, "the server's words", "fetch")
    equal([said, hub.files()], ["team/half: 0.01 GB to download\n", [LIST]], "before, the rest")
    hub.trouble = {}
    equal(hub.ask(PAIRS.format("half", "A"))[0], READ, "the same command again")
    equal(hub.files(), [ZIP], "nothing twice")


def test_without_a_network_the_cache_does(hub):
    """What was fetched is read, though a dry run fails; what was not is an error that says why."""
    hub.ask(PAIRS.format("here", "A"))
    hub.ask("setattr(hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')")
    asked = [hub.ask(PAIRS.format(*x)) for x in (("here", "A"), ("here", "A,B"), ("new", "A"))]
    hub.ask(f"setattr(hub.constants, 'ENDPOINT', '{hub.url}')")
    equal(asked[0], [READ, ""], "the cache")
    for got, _ in asked[1:]:  # older versions of the library take half a snapshot for a whole
        ok = re.match("InputError: --(data team/(here|new): .*refused|subsets B)", str(got))
        expect(ok, got, "one InputError that says why", "fetch")


@pytest.mark.parametrize("data", [True, False])
def test_what_cannot_be_had_is_one_line_with_the_way_out(hub, data):
    """Unknown, private, gated, forbidden, failing, silent: the id, its page, the reason."""
    gated, login = "gated: accept its terms at {}, then `hf auth login`$", "`hf auth login`$"
    for name, trouble, says in (
        ("none", {}, "not at {}; .*" + login),
        ("none", {"": (401, "RepoNotFound")}, "not at {}; .*" + login),  # who is not logged in
        ("gated", {"/resolve/": (401, "GatedRepo")}, gated),
        ("denied", {"/resolve/": (403, "GatedRepo")}, gated),
        ("token", {"/resolve/": (403, "")}, "not fetched from {}: 403 Forbidden.*your token"),
        ("down", {"": (500, "")}, "not fetched from {}: .*500 Internal Server Error"),
        ("mute", {"": "mute"}, "not fetched from {}: Server disconnected"),
    ):
        hub.trouble = trouble
        got, said = hub.ask(f"{'data.read_pairs' if data else 'model.load'}('team/{name}')")
        hub.trouble, page = {}, f"{hub.url}/{'datasets/' if data else ''}team/{name}"
        says = f"InputError: --{'data' if data else 'model'} team/{name}: .*{says.format(page)}"
        expect(re.match(says, str(got)) and "\n" not in got, got, says, "fetch")
        equal([said, hub.files()], ["", []], "nothing but the error")


def test_a_hub_that_was_asked_too_often_is_waited_for(hub):
    """429 at the state of the repository, for which the library does not wait, and at a file's."""
    places = {"GET /api/datasets/team/busy/revision": 2, "HEAD /datasets/team/busy/resolve": 0}
    for asked, lines in places.items():
        hub.trouble, hub.refusals = {asked: (429, "")}, 2
        got, said = hub.ask(PAIRS.format("busy", "A"))
        equal(got, READ, f"after 429 at {asked}")
        equal(hub.trouble, {}, "both refusals were met")
        equal(said.count("asked too often"), lines, f"lines that say so in {said}")
        shutil.rmtree(hub.home / "hub")


class Answered:
    """A hub's answer; a 429 with the time that it asks for."""

    def __init__(self, status, wait=None):
        self.status_code, self.request = status, None
        self.headers = {} if wait is None else {"Retry-After": str(wait)}


def asked_too_often(response, wrapped):
    """The library's error for it; wrapped: as the cause of another one."""
    error = HfHubHTTPError("no", response=response)
    if not wrapped:
        return error
    outer = LocalEntryNotFoundError("no")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_hubs_own_time_is_waited_for_an_hour_at_most(wrapped, monkeypatch, capsys):
    """Without one ever longer ones, 14 minutes in all; what is no 429 is told at once."""
    slept = []
    monkeypatch.setattr(hub_room.time, "sleep", slept.append)

    def asking(*answers):
        due = iter(answers)

        def ask():
            response = next(due)
            if response is None:
                return "here"
            raise asked_too_often(response, wrapped)

        return ask

    ask = asking(Answered(429, 7), Answered(429, 99_999), Answered(429, "soon"), None)
    equal(hub_room.patiently(ask), "here", "in the end")
    equal(slept, [7, hub_room.LONGEST_WAIT, hub_room.WAITS[2]], "seconds")
    for answer, waits in ((Answered(429), hub_room.WAITS), (Answered(500), ())):
        slept.clear()
        with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)):
            hub_room.patiently(asking(*[answer] * 9))
        equal(slept, list(waits), "seconds")


def test_of_the_ranks_of_a_node_one_fetches_and_the_others_wait(hub, tmp_path):
    """Longer than a step's collectives may: 3 s of patience for 4 s. An error reaches all."""
    (statuses, printed), _ = hub.ask(f"on_two_ranks('{tmp_path}')")
    equal(statuses, [0, 0], printed)
    for rank in range(2):
        expect(f"rank {rank}: 1 pairs" in printed, printed, "the data", "once_a_node")
        error = f"rank {rank}: --data team/nowhere: no such folder, and not at"
        expect(error in printed, printed, "the error on each rank", "once_a_node")
    equal(hub.files(), [LIST, ZIP], "nothing twice")


def test_an_unknown_subset_is_an_error_before_anything_is_fetched(hub):
    """Beside one that is there; with the names to choose from."""
    got, said = hub.ask(PAIRS.format("typo", "A,C:9"))
    says = "no C/original-*.parquet in it; it has A,B"
    expect(str(got).endswith(says), got, says, "need")
    equal([said, hub.files()], ["", []], "nothing is fetched")


def test_of_a_model_what_it_needs_is_fetched_and_an_adapter_brings_its_base_along(hub, tmp_path):
    """Weights, configs, the tokenizer: no pickles, no code, no subfolders; nothing twice."""
    base, want = families.build("qwen2_vl", tmp_path / "base"), []
    embedder = model.load(base, 4, device="cpu").eval()
    model.choose_trained(embedder, TrainingFlags(model=str(base), lora_rank=4, dora=True))
    with torch.no_grad():
        for n, p in embedder.named_parameters():
            if "lora_B" in n:
                p += 0.1
    model.save(embedder, tmp_path / "adapter")
    junk = "pytorch_model.bin evil.py training_args.pt LICENSE onnx/model.safetensors".split()
    for folder in (base, tmp_path / "adapter"):
        files = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix != ".md"}
        if folder.name == "adapter":  # as one is saved whose base came from the hub
            said = {**json.loads(files["nanocoma.json"]), "base_is_hub": True}
            files["nanocoma.json"] = json.dumps(said).encode()
            config = json.loads(files["adapter_config.json"])
            config["base_model_name_or_path"] = "team/base"
            files["adapter_config.json"] = json.dumps(config).encode()
        files |= {"notes.txt": b"#", "spare.model": b"##", "README.md": b"# licence"}
        want += [(n, None, len(b)) for n, b in files.items()]
        hub.repos[f"models/team/{folder.name}"] = files | dict.fromkeys(junk, b"#")
    texts = ["a red circle", "two"]
    for said, sent in (("0.00 GB to download", want), ("all here", [])):
        got, printed = hub.ask(f"model.load('team/adapter').eval().encode({texts}).tolist()")
        expect(not isinstance(got, str), got, "vectors", "model.load")
        close(got, embedder.encode(texts), "from the hub")
        equal(printed, f"team/adapter: {said}\nteam/base: {said}\n", "both")
        equal(sorted(hub.sent), sorted(sent), "(file, Range, bytes sent)")
