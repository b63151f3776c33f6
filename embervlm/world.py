"""This process among the others of its run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embervlm.rendezvous import adopt_slurm, joining, meet, tell_gloo


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    background: Any = None
    """A process group over gloo for the thread that writes checkpoints; None for a single process."""
    control: Any = None
    """The group that agrees on flags, over gloo so that nobody waits for a GPU; None is the default group."""

    @classmethod
    def join(cls) -> World:
        """Join the processes that `deepspeed`, `torchrun` or `srun` started; without a launcher, a world of one
        process.

        Raises:
            RendezvousError: the processes did not find each other.
        """
        env = os.environ
        adopt_slurm(env)
        tell_gloo(env)
        rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        local_rank = int(env.setdefault("LOCAL_RANK", "0"))  # DeepSpeed wants it also where a process is alone
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            device = torch.device("cpu")
            env.setdefault("DS_ACCELERATOR", "cpu")
        with joining(rank, size):
            if not dist.is_initialized():
                env.setdefault("MASTER_ADDR", "127.0.0.1")
                backend = "nccl" if device.type == "cuda" else "gloo"
                store = meet() if size > 1 else dist.HashStore()  # alone: no port to collide on
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
            if size == 1:
                return cls(rank, size, device)
            background = dist.new_group(backend="gloo")
            control = dist.new_group(backend="gloo") if device.type == "cuda" else None
        return cls(rank, size, device, background, control)

    @staticmethod
    def leave() -> None:
        """Leave the other processes, if this one has joined them."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process; the same answer on all of them."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, group=self.control)
        return bool(flags)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The `value` of process 0 (anything picklable), on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank."""
        out: list[Any] = [None] * self.size
        if self.size > 1:
            dist.all_gather_object(out, value)
            return out
        return [value]
