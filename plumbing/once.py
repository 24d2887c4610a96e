"""Work that one process of a node does for all of its ranks: downloads, the first look at the data.
(Nodes may have disks of their own: each has a rank that looks.)"""

import os
from datetime import timedelta
from functools import lru_cache

import torch.distributed as dist

from plumbing.errors import InputError
from plumbing.ranks import rank

LONGEST = timedelta(hours=12)  # that the others wait: 13 GB at 0.3 MB a second


def ranks_of_node() -> list:
    """The ranks of this machine, by torchrun's word; without it each is a node of its own."""
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    first = rank() - int(os.environ.get("LOCAL_RANK", 0))
    return list(range(first, first + size))


@lru_cache(1)  # Trap: torch gives a second group of the same ranks the first one's addresses
def group_of_node(world):
    """The process group of this node's ranks, made once. It may wait longer than a step's sums may;
    a rank that ends is noticed at once, by its closed connection. world: the group of all ranks,
    only the cache's key: after another init_process_group it is another one."""
    return dist.new_group(ranks_of_node(), LONGEST, "gloo", use_local_synchronization=True)


def once_a_node(work):
    """work() on the first rank of each node. -> what it returned, on all ranks of the node; or its
    InputError, on all of them alike."""
    ranks = ranks_of_node()
    if not dist.is_initialized() or len(ranks) == 1:
        return work()
    group = group_of_node(dist.group.WORLD)
    answer = [None, None]  # what was returned, or the error
    if rank() == ranks[0]:
        try:
            answer[0] = work()
        except InputError as e:
            answer[1] = e
    dist.broadcast_object_list(answer, ranks[0], group)
    if answer[1]:
        raise answer[1]
    return answer[0]
