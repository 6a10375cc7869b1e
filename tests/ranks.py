"""Processes that play the ranks of a distributed run: started once, they act out one scenario after another (gloo)."""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60.0  # seconds; a scenario takes one or two


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        scenario, rank, world, meeting, arguments = pipe.recv()
        store = dist.FileStore(meeting, world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=PATIENCE)
        )
        try:
            answer = scenario(rank, world, *arguments)
            dist.barrier()
        except Exception:
            answer = Failed(traceback.format_exc())
        if torch.__version__ < (2, 8):
            time.sleep(0.1)  # torch waits below for gloo's threads, which may want the GIL that it holds (pull 154976)
        dist.destroy_process_group()
        pipe.send(answer)


class Failed(str):
    """The traceback of a rank whose scenario raised."""


class Ranks:
    """run(scenario, world, *arguments): what scenario(rank, world, *arguments) returned on each rank.

    Raises AssertionError with the traceback where a rank failed, or its number where it does not answer. A rank that
    ends its process (os._exit) leaves None.
    """

    def __init__(self, folder: Path) -> None:
        """folder: an empty one, where ranks meet."""
        self.processes: list[tuple[Any, Connection]] = []
        self.folder, self.count = folder, 0

    def run(self, scenario: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        while len(self.processes) < world:
            mine, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.processes.append((process, mine))
        self.count += 1
        meeting = str(self.folder / str(self.count))
        pipes = [pipe for _, pipe in self.processes[:world]]
        for rank, pipe in enumerate(pipes):
            pipe.send((scenario, rank, world, meeting, arguments))
        answers: dict[Connection, Any] = {}
        while missing := [pipe for pipe in pipes if pipe not in answers]:
            ready = wait(missing, timeout=PATIENCE)
            for pipe in ready:
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    answers[pipe] = None
            if not ready:
                self.close()
                raise AssertionError(f"deadlock: no answer from ranks {[pipes.index(pipe) for pipe in missing]}")
        told = [answers[pipe] for pipe in pipes]
        if None in told or any(isinstance(answer, Failed) for answer in told):
            self.close()  # a rank is gone, or left in the middle of something
        failed = [f"rank {rank}:\n{answer}" for rank, answer in enumerate(told) if isinstance(answer, Failed)]
        assert not failed, "\n".join(failed)
        return told

    def close(self) -> None:
        for process, pipe in self.processes:
            process.kill()
            process.join()
            pipe.close()
        self.processes = []
