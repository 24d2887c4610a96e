"""All ranks have the same flags, model and data, or none of them begins. What differs is refused
before the first step, with its name and the rank: else two models would be trained as if they were
one."""

import dataclasses
import socket
import sys
from pathlib import Path

from plumbing.combinations import option
from plumbing.ending import StepLeft
from plumbing.errors import InputError, OfAllRanks, brief
from plumbing.ranks import gather_objects, rank, said_while_waiting, setup

# What may differ from node to node: where things lie on its disks (their content is compared, by
# digests), and how many processes read them. Trap: pictures are equal where their paths are, see
# Item.key; with other paths on a node, two equal targets of two nodes are each other's negatives.
OF_A_NODE = ("model", "data", "image_root", "skip_bad", "out", "json", "workers")


def agree(mine, note=""):
    """Raises OfAllRanks where some rank holds other values than rank 0.

    mine: {what it is called: value}, of this rank; note: what else the message says of a rank."""
    label = f"{socket.gethostname()}, {note}" if note else socket.gethostname()
    everyone = gather_objects((label, mine))
    first_label, first = everyone[0]
    for number, (label, values) in enumerate(everyone):
        differ = []
        for name in {**first, **values}:
            one, other = first.get(name), values.get(name)
            if one != other:
                differ.append(f"{name} {brief(other, 60)} where rank 0 has {brief(one, 60)}")
        if differ:
            text = f"rank {number} ({label}) has {', '.join(differ)} (rank 0: {first_label})"
            raise OfAllRanks(f"{text}. All ranks must start alike: the same command on every node")


def together(work):
    """work() on this rank. An InputError of any rank is raised on all, as OfAllRanks, and so is a
    StepLeft: nobody waits in a collective for a rank that has ended. -> what work() returned here.
    """
    result = error = None
    is_left = False
    try:
        result = work()
    except InputError as e:
        error = str(e)
    except StepLeft:
        is_left = True
    everyone = gather_objects((socket.gethostname(), error, is_left))
    if any(left for _, _, left in everyone):
        raise StepLeft
    for number, (host, text, _) in enumerate(everyone):
        if text:
            raise OfAllRanks(f"rank {number} ({host}): {text}" if number else text)
    return result


def on_rank_0(work):
    """work() on rank 0 alone; its InputError is raised on all ranks alike. -> what it returned, on
    rank 0; None on the others."""
    return together(lambda: work() if rank() == 0 else None)


def by_rank_0(work):
    """The same for all ranks: each of them gets what work() returned on rank 0."""
    return gather_objects(on_rank_0(work))[0]


def command_of(cfg) -> str:
    """The name of the file whose flags these are, "contrastive" for example."""
    module = type(cfg).__module__
    return Path(sys.argv[0]).stem if module == "__main__" else module.rpartition(".")[2]


def join(cfg):
    """Joins torchrun's process group. -> this rank's device. Raises InputError where the flags are
    not the same on all ranks: before anything is loaded, and before the first collective that one
    of them would not take part in."""
    flags = {"the script": Path(sys.argv[0]).name}
    for field in dataclasses.fields(cfg):
        if field.init and field.name not in OF_A_NODE:
            flags[option(field.name)] = getattr(cfg, field.name)
    with said_while_waiting():  # on GPUs it is only the first collective that waits
        device = setup()
        agree(flags)
    return device
