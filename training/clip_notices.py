"""Keep Lightning's own notices out of a command's output: what concerns a user we say ourselves. Called by commands only."""
from __future__ import annotations

import logging
import warnings

NOTICES = (r".*module\(s\) in eval mode", r".*isinstance\(treespec, LeafSpec\)", r"The number of training batches",
           r".*does not have many workers", r"You're resuming from a checkpoint that ended before the epoch",
           r"Checkpoint directory .* exists and is not empty", r"You defined a `validation_step` but have no `val_dataloader`")


def quiet_lightning() -> None:
    """Of this process: no tips, device lists and advertisements; none of the warnings that do not hold for our loops."""
    for package in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{package}.utilities.rank_zero").setLevel(logging.WARNING)
    for notice in NOTICES:
        warnings.filterwarnings("ignore", notice)
