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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from preprocessing.errors import OptionError

TIMEOUT_MINUTES = 30.0
LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|recv|socket", re.IGNORECASE)


def rank_and_size() -> tuple[int, int]:
    """This process's place among those of the run, (0, 1) when it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """True on the one rank that writes files and speaks."""
    return rank_and_size()[0] == 0


def local_device(device: str) -> str:
    """`device`; of several ranks on one machine's GPUs, each takes its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and "WORLD_SIZE" in os.environ else device


@contextmanager
def joined_ranks(device: str, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[None]:
    """Join the ranks that torchrun started, if it did. A rank that fails or hangs ends the others within the timeout, in one line."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=timeout_minutes))
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:160]
        raise OSError(f"rank {os.environ['RANK']}: another process of this run ended or did not answer ({reason})") from error
    finally:
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
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if times else None


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
