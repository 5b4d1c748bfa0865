"""The processes ("ranks") of one torchrun job: join, share a global batch, sum gradients, agree on what happens next.

    torchrun --nproc-per-node 4 train_gan.py ...        NCCL on GPUs, gloo on CPUs

The GAN's loop runs on these alone; CLIP's ranks are joined by Lightning (training/clip_ranks.py) and share `gather_rows` and `own_rows`.
No wrapper around the GAN's networks: every rank holds them whole and computes its rows of the global batch; one coalesced all-reduce adds
the gradients, after which all ranks take the same step. In a run of one process everything here does nothing.
"""
from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.features import pick_device
from preprocessing.errors import EXIT_INTERRUPTED, OptionError, is_out_of_memory
from training.meeting import meet

TIMEOUT_MINUTES, LONGEST_MINUTES = 30.0, 7 * 24 * 60.0
GRACE_S = 3.0        # what ends all ranks is said by the first of them, whose end lets torchrun end the others meanwhile
LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|recv|socket", re.IGNORECASE)


def rank_and_size() -> tuple[int, int]:
    """This process's place among those of the run, (0, 1) when it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """True on the one rank that writes files and speaks."""
    return rank_and_size()[0] == 0


@dataclass(frozen=True)
class Place:
    """This process's place among those of the run, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, asked: str | None) -> str:
        """The device of this rank: of several GPUs its own."""
        name = pick_device(asked or "auto")
        if self.size == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise OptionError("--device", "cpu or cuda, as torchrun gives every process its own GPU", name)
        if self.local_size > torch.cuda.device_count():
            raise OptionError("--nproc-per-node", f"at most the {torch.cuda.device_count()} GPUs of this machine", str(self.local_size))
        return f"cuda:{self.local_rank}"


def named_place() -> Place:
    """The place that torchrun's environment names; a process that nobody joined is rank 0 of 1."""
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0") if size == 1 else os.environ["RANK"])
        place = Place(rank, size, *(int(os.environ.get(name, missing)) for name, missing in
                                                       (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))))
        if not (0 <= place.rank < size and 0 <= place.local_rank < place.local_size):
            raise ValueError(f"rank {place.rank} of {size}, of which {place.local_rank} of {place.local_size} on this machine")
    except KeyError as error:
        raise _not_torchrun("no RANK") from error
    except ValueError as error:
        raise _not_torchrun(str(error)) from error
    return place


def join(backend: str, timeout: timedelta) -> None:
    """Meet the other ranks where torchrun's environment says; nobody waits longer than the timeout for another, here and later. The
    first on each machine says that it waits."""
    place = named_place()
    try:
        meet(lambda: dist.init_process_group(backend, timeout=timeout), place.size, timeout, speaks=place.local_rank == 0)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise _lost(error, "the processes of this run do not find each other") from error
    except (ValueError, RuntimeError) as error:
        raise _not_torchrun(str(error).splitlines()[0]) from error


def _not_torchrun(found: str) -> OptionError:
    return OptionError("RANK, WORLD_SIZE, MASTER_ADDR, ...", "as torchrun sets them", found)


def _lost(error: Exception, what: str = "another process of this run ended or did not answer") -> OSError:
    reason = " ".join(str(error).split())[:160]
    return OSError(f"rank {os.environ['RANK']}: {what} ({reason})")


def waiting_time(minutes: float) -> timedelta:
    """What `--timeout-minutes` says."""
    if not 0 < minutes <= LONGEST_MINUTES:      # false for NaN, too
        raise OptionError("--timeout-minutes", f"more than 0, at most {LONGEST_MINUTES:g} (a week)", f"{minutes:g}")
    return timedelta(minutes=minutes)


@contextmanager
def joined_ranks(asked: str | None, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[str]:
    """Join the ranks that torchrun started, if it did; yields this rank's device. What ends one ends all within the timeout, and
    is said once: a rank keeps silent for a while for each before it, one that only misses another for one turn more."""
    place, timeout = named_place(), waiting_time(timeout_minutes)
    if place.size == 1:
        yield place.device(asked)
        return
    try:
        device = place.device(asked)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        join("nccl" if device.startswith("cuda") else "gloo", timeout)
        yield device
    except KeyboardInterrupt:
        if place.is_first:
            raise
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as error:
        is_lost = isinstance(error, RuntimeError) and not is_out_of_memory(error) and LOST.search(str(error))
        time.sleep(GRACE_S * (place.rank + bool(is_lost)))
        if is_lost:
            raise _lost(error) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_part(batch: int, batch_gpu: int) -> range:
    """First rows of this rank's micro-batches in a global batch."""
    rank, size = rank_and_size()
    if batch % (batch_gpu * size):
        raise OptionError("--batch", f"a multiple of --batch-gpu {batch_gpu} times {size} processes", str(batch))
    share = batch // size
    return range(rank * share, (rank + 1) * share, batch_gpu)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over ranks, in one all-reduce; a parameter without one on some rank counts as zero there."""
    if rank_and_size()[1] == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in trained]
    used = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=trained[0].device)
    flat = torch.cat([used, *(gradient.flatten().float() for gradient in gradients)])
    dist.all_reduce(flat)
    used, *parts = flat.split([len(trained), *(gradient.numel() for gradient in gradients)])
    for parameter, part, times in zip(trained, parts, used.tolist(), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter)) if times else None    # in the parameter's layout


def sum_values(values: Mapping[str, float], device: torch.device | str) -> dict[str, float]:
    """Numbers added over ranks, in float64; every rank must bring the same names in the same order."""
    if rank_and_size()[1] == 1:
        return dict(values)
    summed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return dict(zip(values, summed.tolist(), strict=True))


def from_first(value: Any) -> Any:
    """Rank 0's `value`, plain JSON, on every rank."""
    if rank_and_size()[1] == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    content = json.dumps(value).encode() if is_first() else b""
    length = torch.tensor(len(content), device=device)
    dist.broadcast(length, 0)
    text = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if is_first():
        text.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(text, 0)
    return json.loads(text.cpu().numpy().tobytes())


def any_rank(number: int, device: torch.device | str) -> int:
    """The largest of the ranks' numbers: a signal that reached one of them reaches all."""
    if rank_and_size()[1] == 1:
        return number
    highest = torch.tensor(number, device=device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a row is summed over ranks and goes back to its owner."""

    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)   # others may read what autograd handed us
        dist.all_reduce(gradient)
        share = len(gradient) // dist.get_world_size()
        start = share * dist.get_rank()
        return gradient[start:start + share]


def gather_rows(rows: Tensor) -> Tensor:
    """(N, ...) of this rank -> (ranks x N, ...) of all; every rank must hold the same N. One process: the rows themselves.

    Every rank computes the same global loss, so the summed gradient counts it once a rank; averaging gradients over
    ranks, as data-parallel training does, brings back the gradient of one rank with the whole batch.
    """
    return _GatherRows.apply(rows) if rank_and_size()[1] > 1 else rows


def own_rows(n_rows: int) -> Tensor:
    """Places (int64) of this rank's share of `n_rows`, as many on every rank: `gather_rows(share)[:n_rows]` is whole and in order."""
    rank, size = rank_and_size()
    share = -(-n_rows // size)
    return (rank * share + torch.arange(share)).clamp(max=n_rows - 1)   # the last row repeats where the shares are uneven
