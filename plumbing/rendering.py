"""A chat template is a program that came with a model: it is run in jinja's sandbox, in a process
of its own, with limits on its time, its memory and what it writes."""

import json
import multiprocessing
import os
import resource
import signal
from functools import lru_cache

from transformers.utils.chat_template_utils import render_jinja_template

from plumbing.ending import ignore_terminal
from plumbing.errors import InputError, brief

LONGEST = 1_000_000  # characters, of a template and of what it writes
PROCESSOR_SECONDS, MEMORY = 2, 2**30  # an honest one takes milliseconds
WAIT = 60  # seconds: a machine may be busy, a process limit is met long before


def render(template, chats, variables, **options) -> list:
    """What a chat template writes for each chat: a text, or where it fails an InputError, as an
    element. variables: what else it may name, as `bos_token`; options: of transformers'
    `render_jinja_template`. Raises InputError where it goes beyond its limits."""
    if not isinstance(template, str) or len(template) > LONGEST:
        raise InputError(f"the chat template: no text of at most {LONGEST:,} characters")
    request = {"template": template, "chats": chats, "variables": variables, "options": options}
    texts = []
    for answer in json.loads(rendered(json.dumps(request))):
        error = answer.get("error")
        texts.append(InputError(f"the chat template: {error}") if error else answer["text"])
    return texts


@lru_cache(64)  # every Embedder of a model asks the same
def rendered(request) -> str:
    """JSON in, JSON out: the child below is run and watched."""
    context = multiprocessing.get_context("fork")  # it has jinja already, and starts at once
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=render_here, args=(request, sender), daemon=True)
    child.start()
    sender.close()  # Trap: while this end is open, a child that dies is not noticed
    try:
        if not receiver.poll(WAIT):
            raise EOFError
        return receiver.recv_bytes().decode()
    except EOFError:
        text = f"beyond {PROCESSOR_SECONDS} s or {MEMORY >> 20} MiB: it loops, or is hostile"
        raise InputError(f"the chat template: {text}") from None
    finally:
        child.kill()
        child.join()
        receiver.close()


def render_here(request, sender):
    """What the child does: all chats, then its answer."""
    ignore_terminal()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    if os.path.exists("/proc/self/statm"):  # beyond what it has from its parent
        with open("/proc/self/statm") as file:
            has = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # may have been set before us
        most = has + MEMORY if hard == resource.RLIM_INFINITY else min(has + MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    request = json.loads(request)
    answers = [render_one(request, chat) for chat in request["chats"]]
    sender.send_bytes(json.dumps(answers).encode())


def render_one(request, chat) -> dict:
    """{"text": ...} or {"error": ...}."""
    try:
        (text,), _ = render_jinja_template(
            [chat], chat_template=request["template"], **request["variables"], **request["options"]
        )
    except Exception as e:  # whatever a program of others may raise
        return {"error": brief(f"{type(e).__name__}: {e}")}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text):,} characters around a few words"}
    return {"text": text}
