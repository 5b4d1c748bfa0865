"""Where a GAN run stands: its counters, and the line that says so."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHORT_RUN_FADE = 0.1        # share of the run over which the blur fades, unless said in kimg
OPTIONAL = ("loss/diversity", "loss/rec", "loss/clip", "loss/mismatch", "loss/r1", "logits/gap", "augment/p")   # of a status line


@dataclass
class Progress:
    """Counters of a run; what a checkpoint's state.json keeps."""

    step: int = 0
    elapsed_s: float = 0.0            # wall time over all parts of the run
    bad_steps: int = 0                # steps skipped because of NaN or infinite numbers, in all
    bad_in_a_row: int = 0
    last_tick: tuple[float, float] = (0.0, 0.0)    # (kimg, share of the run) of the last status line
    last_snap: tuple[float, float] = (0.0, 0.0)
    blur_fade_kimg: float | None = None   # when the blur is gone: settled when the run starts, so that a longer --kimg does not blur again
    augment_p: float = 1.0                # share of images that are augmented; augment_target moves it
    sigma: float | None = None            # px, blur of the last step: it never rises
    first_step: int = 0                   # where the run began: more than 0 with --resume-kimg


def resolved_fade_kimg(said: float | None, kimg: float) -> float:
    """When the blur is gone: as said, else after a tenth of a run of `kimg`."""
    return SHORT_RUN_FADE * kimg if said is None else said


def status_line(values: Mapping[str, float]) -> str:
    """One aligned line: always the same fields in the same order."""
    minutes, seconds = divmod(int(values["elapsed_s"]), 60)
    fields = [f"kimg {values['kimg']:<8.2f}", f"time {f'{minutes}m {seconds:02d}s':<9}", f"sec/kimg {values['sec_per_kimg']:<7.1f}"]
    fields += [f"{name} {values.get(name, float('nan')):<8.3f}" for name in ("loss/D", "loss/G", "logits/real", "logits/fake")]
    fields += [f"{name} {values[name]:<8.3f}" for name in OPTIONAL if name in values]
    return "  ".join(fields).rstrip()
