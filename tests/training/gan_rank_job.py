"""One rank of a job started by tests/training/test_gan_ranks.py: steps of a tiny run, whose end state goes to a file."""
import os
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from gan_runs import make_run, tiny_data  # noqa: E402

from preprocessing.errors import one_line_errors  # noqa: E402
from training.image_metrics import parse_metrics  # noqa: E402
from training.ranks import is_first, joined_ranks  # noqa: E402


def main(folder: str, preset: str, fault: str) -> None:
    with joined_ranks("cpu", timeout_minutes=0.25 if fault == "hang" else 0.5):
        if fault == "raise" and os.environ.get("RANK") == "1":
            raise SystemExit(9)
        if fault == "hang" and os.environ["RANK"] == "1":
            time.sleep(600)
        run = make_run(Path(folder), preset, tiny_data(n=40, validation=True), batch=16, kimg=100 if fault == "stop" else 0.064,
                       clip_weight=0.0, watched=parse_metrics("fd_random_tiny,kd_random_tiny"))
        losses = []
        for step in run.train():
            losses.append(step)
            if fault == "stop":
                (Path(folder) / "stepped").touch()       # signals are the run's from here on, on every rank
        if is_first():
            weights = {**run.gan.generator.state_dict(), **run.gan.discriminator.trainable_state()}
            torch.save({"weights": weights, "average": run.average.state_dict(), "losses": losses}, Path(folder) / "end.pt")


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
