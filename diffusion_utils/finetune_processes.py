"""The processes of a fine-tune: accelerate's, one a device, that end together and say once what went wrong."""
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from diffusion_utils.finetune_config import FinetuneConfig
from preprocessing.errors import InputError, OptionError
from preprocessing.interrupts import stop_signals
from training.ranks import LOST, join, named_place

GRACE_S = 3.0   # a process that fails with another, or by its end, waits so long for that one's message, and to be ended by the launcher


def make_accelerator(config: FinetuneConfig):
    """Join the processes that a launcher started, if one did; one that waits longer than `timeout_minutes` for another gives up."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    precision = config.mixed_precision or ("bf16" if torch.cuda.is_available() else "no")
    timeout, place = timedelta(minutes=config.timeout_minutes), named_place()
    if place.size > 1:                       # accelerate finds them joined; where a signal came, its own wait would not end
        os.environ.setdefault("LOCAL_RANK", str(place.local_rank))           # without it accelerate believes that it is alone
        join("nccl" if torch.cuda.is_available() else "gloo", timeout)
    waits = InitProcessGroupKwargs(timeout=timeout)
    ranks_on_cpus = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()     # accelerate sees these only if it is told to
    accelerator = Accelerator(mixed_precision=precision, cpu=ranks_on_cpus, kwargs_handlers=[waits])
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise OptionError("accelerate launch", "one process, or data-parallel ones", str(accelerator.distributed_type.value))
    return accelerator


@contextmanager
def ending_together() -> Iterator[None]:
    """Around a whole run: of several processes the first that fails speaks, and its end ends the others within the timeout."""
    place = named_place()                    # refuses one that contradicts itself before a folder is locked, or not
    rank, size = place.rank, place.size
    try:
        yield
    except (InputError, OptionError, OSError):
        if rank:                             # what all have found wrong, the first says
            time.sleep(GRACE_S)
        raise
    except RuntimeError as error:
        if size == 1 or not lost_another(error):
            raise
        time.sleep(GRACE_S)
        reason = " ".join(str(error).split())[:160]
        raise OSError(f"process {rank}: another process of this run ended or did not answer ({reason})") from error


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """`stop_signals` in which a process that its launcher ends, as another one failed, goes in silence: that one has said why."""
    with stop_signals() as stopped:
        try:
            yield stopped
        except RuntimeError as error:
            if lost_another(error) and stopped:
                raise SystemExit(128 + stopped[0]) from error
            raise


def lost_another(error: RuntimeError) -> bool:
    """True for what a collective raises where another process is gone or silent."""
    return LOST.search(str(error)) is not None
