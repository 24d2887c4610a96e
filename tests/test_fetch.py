"""What is asked of the hub, in this process, with stand-ins for its library and for ranks: which
files, how much is said, who asks. (Against a small hub on 127.0.0.1: test_hub.py.)"""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from checks import equal, expect
from huggingface_hub import errors

from plumbing import hub, once, ranks
from plumbing.errors import InputError


class Library:
    """In the place of snapshot_download: it notes what it is asked for, and has two files."""

    def __init__(self, error=None):
        self.asked, self.error = [], error
        self.files = [
            SimpleNamespace(
                filename="A/original-0.parquet", file_size=3 * 10**9, will_download=True
            ),
            SimpleNamespace(filename="A/x.txt", file_size=10**9, will_download=False),
        ]

    def __call__(self, name, dry_run=False, **settings):
        self.asked.append((name, dry_run, settings))
        if self.error:
            raise self.error
        return self.files if dry_run else "/cache/here"


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(hub, "snapshot_download", library)
    bars = []
    monkeypatch.setattr(hub, "enable_progress_bars", lambda: bars.append(1))
    library.bars = bars
    return library


def test_only_what_is_needed_is_asked_for(library):
    """First how much it is, then the files; of a model none in subfolders."""
    for kind, ignored in (("dataset", None), ("model", "*/*")):
        library.asked.clear()
        equal(hub.fetch_here("team/set", kind, ["*.zip"], ["A/*.parquet"]), "/cache/here", kind)
        settings = dict(repo_type=kind, allow_patterns=["A/*.parquet", "*.zip"])
        settings.update(ignore_patterns=ignored)
        want = [("team/set", True, settings), ("team/set", False, settings)]
        equal(library.asked, want, f"snapshot_download of a {kind}")


def test_so_much_is_said_as_is_not_here_yet(library, capsys):
    """On rank 0, with a bar; without one where all is here."""
    hub.fetch_here("team/set", "dataset", [], ["A/*.parquet"])
    equal(capsys.readouterr().out, "team/set: 3.00 GB to download\n", "hub.announce")
    equal(len(library.bars), 1, "a bar")
    library.files[0].will_download = False
    hub.fetch_here("team/set", "dataset", [], ["A/*.parquet"])
    equal(capsys.readouterr().out, "team/set: all here\n", "hub.announce")
    equal(len(library.bars), 1, "no second one")
    with pytest.MonkeyPatch.context() as patch:
        for module in (hub, ranks):
            patch.setattr(module, "rank", lambda: 1)
        library.files[0].will_download = True
        hub.fetch_here("team/set", "dataset", [], ["A/*.parquet"])
    equal(capsys.readouterr().out, "", "another rank")
    equal(len(library.bars), 1, "and no bar of its own")


def test_a_pattern_that_finds_nothing_is_an_error_before_anything_is_fetched(library, monkeypatch):
    """With the folders that there are; a file beside them is none."""
    files = ["A/original-0.parquet", "x/y", "original-0.parquet"]
    api = SimpleNamespace(list_repo_files=lambda name, repo_type: files)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    with pytest.raises(InputError, match="no C/original-.*parquet in it; it has A$"):
        hub.fetch_here("team/set", "dataset", [], ["A/*.parquet", "C/original-*.parquet"])
    equal([dry for _, dry, _ in library.asked], [True], "nothing is fetched")


def test_the_reason_is_the_cause_where_the_library_hides_it(monkeypatch):
    """Its "not found in the cache" says nothing of a refused connection."""
    error = errors.LocalEntryNotFoundError("not in the cache")
    error.__cause__ = OSError("connection refused")
    alone = errors.LocalEntryNotFoundError("no folder of it")  # as where HF_HUB_OFFLINE is set
    for raised, says in (
        (error, "connection refused"),
        (alone, "no folder of it"),
        (OSError("full"), "full"),
        (RuntimeError("the client is closed"), "the client is closed"),  # as the library says it
    ):
        monkeypatch.setattr(hub, "snapshot_download", Library(raised))
        with pytest.raises(InputError, match=f"--data team/set: no folder, .*: {says}"):
            hub.fetch_here("team/set", "dataset", [], [])


def test_a_hub_that_is_asked_too_often_in_the_midst_of_a_download_is_waited_for(
    library, monkeypatch
):
    """Not only where it is asked how much there is."""
    busy = SimpleNamespace(status_code=429, headers={}, request=None)
    errors_left, slept = [errors.HfHubHTTPError("no", response=busy)], []

    def snapshot_download(*args, dry_run=False, **settings):
        if not dry_run and errors_left:
            raise errors_left.pop()
        return library(*args, dry_run=dry_run, **settings)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub.time, "sleep", slept.append)
    equal(hub.fetch_here("team/set", "dataset", [], []), "/cache/here", "in the end")
    equal(slept, [hub.WAITS[0]], "seconds")


@pytest.mark.parametrize("name", ["set", "a/b/c", "./set", "/set", "../set", ""])
def test_a_path_is_not_asked_for(library, name):
    """A hub id is two words."""
    for kind, says in (("dataset", "--data .*shapes, a .jsonl"), ("model", "--model .*toy")):
        with pytest.raises(InputError, match=says):
            hub.fetch_here(name, kind, [], [])
    equal(library.asked, [], "nothing")


def test_of_several_ranks_one_of_a_node_asks(library, monkeypatch):
    """And a rank may ask again, alone: it has the answer."""
    hub.fetch_together.cache_clear()
    works = []

    def once_a_node(work):
        works.append(work)
        return "/theirs"

    monkeypatch.setattr(hub, "once_a_node", once_a_node)
    equal(hub.fetch("team/set", "dataset", [], []), "/cache/here", "one process")
    equal(works, [], "one process")
    monkeypatch.setattr(hub.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(hub.dist, "get_rank", lambda: 0)
    for name in ("team/set", "team/model", "team/set"):  # also where it was not the last one
        equal(hub.fetch(name, "dataset", [], []), "/theirs", "as one of several")
    equal(len(works), 2, "fetch_together: each name once")
    equal(works[0](), "/cache/here", "what the one does")
    hub.fetch_together.cache_clear()


# ------------------------------------------------------------------------------- once on each node


@pytest.fixture
def node(monkeypatch):
    """node(rank, answer): this process is rank 4 or 5 of two nodes of two, or of three; it hears
    `answer`. -> the calls of torch.distributed."""

    def become(rank, local, answer=None):
        calls = []
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setattr(once, "rank", lambda: rank)

        def new_group(ranks, timeout, backend, use_local_synchronization):
            calls.append(("group", ranks, timeout, backend, use_local_synchronization))
            return "a group"

        def broadcast_object_list(objects, source, group):
            calls.append(("broadcast", list(objects), source, group))
            objects[:] = answer or objects

        dist = SimpleNamespace(is_initialized=lambda: True, new_group=new_group)
        dist.broadcast_object_list = broadcast_object_list
        dist.group = SimpleNamespace(WORLD="world")
        monkeypatch.setattr(once, "dist", dist)
        once.group_of_node.cache_clear()
        return calls

    yield become
    once.group_of_node.cache_clear()


def test_the_first_rank_of_a_node_works_and_says_what_came_of_it(node):
    """To the ranks of its node, in a group whose patience is of hours."""
    calls = node(4, 0)
    equal(once.once_a_node(lambda: "folder"), "folder", "once_a_node")
    group, broadcast = calls
    equal(group[:2], ("group", [4, 5]), "the ranks of this node")
    expect(group[2] >= timedelta(hours=6), group, "hours", "13 GB take long")
    equal(group[3:], ("gloo", True), "of these ranks alone")
    equal(broadcast, ("broadcast", ["folder", None], 4, "a group"), "from the first one")


def test_the_others_wait_and_do_nothing(node):
    """They hear what was returned."""
    calls = node(5, 1, ["folder", None])
    equal(once.once_a_node(lambda: pytest.fail("work")), "folder", "once_a_node")
    equal(calls[1][2], 4, "from the first one")


def test_an_error_of_the_first_one_is_everybodys(node):
    """Else the others would wait for ever."""
    error = InputError("no such folder")

    def fail():
        raise error

    calls = node(4, 0)
    with pytest.raises(InputError, match="no such folder"):
        once.once_a_node(fail)
    equal(calls[1][1], [None, error], "it is sent before it is raised")
    node(5, 1, [None, error])
    with pytest.raises(InputError, match="no such folder"):
        once.once_a_node(lambda: pytest.fail("work"))


def test_a_process_of_its_own_does_its_work_itself(monkeypatch):
    """Without torchrun, or alone on its node."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    equal((once.ranks_of_node(), once.once_a_node(lambda: 3)), ([0], 3), "no torchrun")
    monkeypatch.setattr(once, "dist", SimpleNamespace(is_initialized=lambda: True))
    equal(once.once_a_node(lambda: 3), 3, "alone on its node")
