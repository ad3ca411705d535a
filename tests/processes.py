"""Runs a function of a test as several ranks of a gloo process group, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

Rank = Callable[[int, Path], None]


def run_ranks(function: Rank, folder: Path, ranks: int = 2) -> None:
    """Call ``function(rank, folder)`` in each process; it hands results over as files in `folder`.

    Args:
        function: of a module's top level, so that a new process can import it.
        folder: exists and is shared by all ranks.
        ranks: how many processes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the function raised in one of them.
    """
    start_processes(_rank, args=(function, str(folder), ranks), nprocs=ranks, start_method="spawn")


def _rank(rank: int, function: Rank, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", ranks)
    distributed.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    function(rank, Path(folder))
    distributed.barrier()  # nobody leaves while another rank may still be talking to it
    # Without the interpreter's own end: gloo's threads may still let go of tensors, and a thread that asks for the
    # interpreter while that is taken down is unwound by force, which C++ answers with std::terminate, now and then.
    os._exit(0)
