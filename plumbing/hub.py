"""Downloads from the hub, by huggingface_hub: only the files that are needed, each once, by one
process of each node."""

import os
import time
from contextlib import suppress
from fnmatch import fnmatch
from functools import lru_cache, partial

import torch.distributed as dist
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import enable_progress_bars

from plumbing.errors import InputError, brief
from plumbing.once import once_a_node
from plumbing.ranks import rank, say

WAITS = (5, 15, 60, 180, 300, 300)  # seconds after a 429 that says no time of its own; 14 minutes
LONGEST_WAIT = 3600  # that a hub's own time is waited for


def fetch(name, kind, wanted, need) -> str:
    """The folder of a hub id, with its files that fit the patterns `wanted` and `need`; of `need`
    each must find some. Says their size first, fetches no whole file twice, and goes by the cache
    where there is no network. kind: "dataset", or "model": without subfolders. One rank of each
    node asks the hub; the others wait for it, for hours where it takes so long."""
    if dist.is_initialized():
        return fetch_together(name, kind, tuple(wanted), tuple(need))
    return fetch_here(name, kind, wanted, need)


@lru_cache(None)  # so that a rank may ask again alone for what all have asked for
def fetch_together(name, kind, wanted, need) -> str:
    """`fetch_here` on one rank of each node, for all."""
    return once_a_node(lambda: fetch_here(name, kind, wanted, need))


def fetch_here(name, kind, wanted, need) -> str:
    """`fetch` in this process."""
    flag, choices, path = "--model", "toy", ""
    if kind == "dataset":
        flag, choices, path = "--data", "shapes, a .jsonl", "datasets/"
    if os.path.isfile(name):
        raise InputError(f"{flag} {brief(name)}: is a file; name the folder that it is in")
    # A path that is not there must not be asked for at the hub.
    if name.count("/") != 1 or name[0] in "./":
        way = f"choose {choices}, a folder, or a hub id"
        raise InputError(f"{flag} {brief(name)}: no such folder; {way}")
    page = f"{constants.ENDPOINT}/{path}{name}"
    download = partial(
        snapshot_download,
        name,
        repo_type=kind,
        allow_patterns=[*need, *wanted],
        ignore_patterns="*/*" if kind == "model" else None,
    )
    try:
        with suppress(errors.DryRunError):  # no network, or no such id: download() tells them apart
            announce(name, kind, patiently(partial(download, dry_run=True)), need)
        return patiently(download)
    except errors.GatedRepoError:
        reason = f"gated: accept its terms at {page}, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = f"no such folder, and not at {page}; if it is private, `hf auth login`"
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as e:
        if type(e) is errors.LocalEntryNotFoundError:  # its cause says more
            e = e.__cause__ or e
        reason = f"no folder, and not fetched from {page}: {brief(e, 500)}"
    raise InputError(f"{flag} {brief(name)}: {reason}")


def patiently(ask):
    """ask(), again and again while the hub says that it was asked too often (429); what is fetched
    by then stays. (huggingface_hub waits for whole files only, and half a minute at most.)"""
    for wait in (*WAITS, None):
        try:
            return ask()
        except (errors.HfHubHTTPError, errors.DryRunError, errors.LocalEntryNotFoundError) as e:
            # The last two stand for any reason, which is their cause.
            response = getattr(e, "response", None) or getattr(e.__cause__, "response", None)
            if response is None or response.status_code != 429 or wait is None:
                raise
            asked = response.headers.get("Retry-After", "")
            wait = min(int(asked), LONGEST_WAIT) if asked.isdigit() else wait
            say(f"the hub says that it was asked too often (429): again in {wait} s")
            time.sleep(wait)


def announce(name, kind, files, need):
    """Prints how much there is to download; ValueError where a pattern of `need` finds no file."""
    for pattern in need:
        if not any(fnmatch(f.filename, pattern) for f in files):
            file = pattern.split("/")[-1]
            there = HfApi().list_repo_files(name, repo_type=kind)
            folders = sorted({f.split("/")[0] for f in there if fnmatch(f, f"*/{file}")})
            raise ValueError(f"no {pattern} in it; it has {','.join(folders) or 'none'}")
    size = sum(f.file_size or 0 for f in files if f.will_download)
    say(f"{name}: {size / 1e9:.2f} GB to download" if size else f"{name}: all here")
    if size and rank() == 0:  # Trap: weights.py switches these bars off, with those of transformers
        enable_progress_bars()
