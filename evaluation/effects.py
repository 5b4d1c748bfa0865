"""How much a change of genes moves the picture: changes of nuclei and stain with intervals over seeds, beside random gene sets.

Touches no files. Before and after a change, a patch has the same spot and the same noise; what differs, the genes did. Letters: n spots,
k seeds, R random sets.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as students_t

from evaluation.nuclei import STATISTICS

NEGLIGIBLE = 0.05          # deviations: a change below it is nothing to speak of, however sure
DIFFERENCE_RANGE = 80      # grey levels that have the full colour in a difference map


@dataclass(frozen=True)
class Effect:
    """The change of one statistic."""

    name: str                         # of STATISTICS
    before: float                     # mean over spots and seeds
    change: float                     # mean of after - before
    interval: tuple[float, float]     # 95 %, Student's t over the seeds
    spread: float                     # deviation of `before` over spots and seeds: what "much" is
    controls: np.ndarray              # (R,) changes by random sets

    @property
    def control_range(self) -> tuple[float, float]:
        """The middle 95 % of the random sets."""
        return tuple(np.quantile(self.controls, [0.025, 0.975]).tolist()) if len(self.controls) else (float("nan"), float("nan"))

    @property
    def has_interval(self) -> bool:
        """Not with one seed, nor where fewer than two seeds have both patches measured."""
        return bool(np.isfinite(self.interval).all())

    @property
    def p_value(self) -> float:
        """Share of random sets that change as much, either way, with the set itself counted among them."""
        return float((1 + (np.abs(self.controls) >= abs(self.change)).sum()) / (1 + len(self.controls)))

    @property
    def stands_out(self) -> bool:
        """The interval leaves out 0, no more than one in twenty random sets does as much, and it is not negligible."""
        low, high = self.interval
        is_rare = not len(self.controls) or self.p_value <= 0.05
        return bool((low > 0 or high < 0) and is_rare and abs(self.change) >= NEGLIGIBLE * self.spread)

    def to_json(self) -> dict[str, object]:
        return {"before": self.before, "change": self.change, "ci95_over_seeds": list(self.interval), "spread_before": self.spread,
                "change_in_spreads": self.change / self.spread if self.spread > 0 else None, "random_sets_95": list(self.control_range),
                "n_random_sets": len(self.controls), "p_value": self.p_value if len(self.controls) else None,
                "stands_out": self.stands_out}


def effects_of(before: np.ndarray, after: np.ndarray, controls: np.ndarray) -> list[Effect]:
    """`before`, `after` (n, k, 5), `controls` (R, n, k, 5), all of `STATISTICS`. A patch without nuclei has no area: such pairs are left
    out, on both sides."""
    effects = []
    for column, name in enumerate(STATISTICS):
        start = before[..., column]
        by_seed = nan_mean(after[..., column] - start, axis=0)                             # (k,)
        by_set = nan_mean((controls[..., column] - start).reshape(len(controls), start.size), axis=1) if len(controls) else np.zeros(0)
        change = float(nan_mean(by_seed, axis=0))
        seen = start[np.isfinite(start)]
        effects.append(Effect(name, float(seen.mean()) if len(seen) else float("nan"), change, _interval(by_seed),
                              float(seen.std()) if len(seen) else float("nan"), by_set[np.isfinite(by_set)]))
    return effects


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the finite values; NaN, without a warning, where there are none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    return np.where(count > 0, np.where(finite, values, 0).sum(axis=axis) / np.maximum(count, 1), np.nan)


def _interval(by_seed: np.ndarray) -> tuple[float, float]:
    values = by_seed[np.isfinite(by_seed)]
    if len(values) < 2:
        return float("nan"), float("nan")
    half = students_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def difference_map(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of two (H, W, 3), or of two means over seeds: blue where the patch became darker, orange where lighter."""
    change = (after.astype(float) - before.astype(float)).mean(axis=-1, keepdims=True) / DIFFERENCE_RANGE
    lighter, darker = np.clip(change, 0, 1), np.clip(-change, 0, 1)
    white, blue, orange = np.full(3, 255.0), np.array([20.0, 60.0, 160.0]), np.array([225.0, 110.0, 0.0])
    return np.rint(white + lighter * (orange - white) + darker * (blue - white)).astype(np.uint8)
