"""What a simulated sample is told: one table, checked when it is built."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preprocessing.errors import OptionError

PLATFORMS = ("visium-v1", "visium-v2", "visium-hd")
BIN_UM = 2.0                     # Visium HD
MOST_UMIS = 1_000_000            # mean of a spot: ten times what a deeply sequenced one has


@dataclass(frozen=True)
class SimulateConfig:
    """One simulated sample."""

    out_dir: Path
    platform: Literal["visium-v1", "visium-v2", "visium-hd"] = "visium-v2"
    sample_id: str = "SIM1"
    width_um: float = 2000.0          # of the slide without its rim, which is the array; tissue leaves a margin of glass
    height_um: float = 2000.0
    mpp: float = 0.5                  # µm per level-0 pixel
    genes: int = 500
    seed: int = 0                     # tissue, counts and slide effect of this sample
    biology_seed: int = 0             # which genes carry which morphology: the same for a cohort
    stain_seed: int | None = None     # stain vectors; None: follows the seed
    slide_effect: float = 0.15        # deviation of the log batch effect of a gene
    umis: float | None = None         # mean UMIs of a spot or bin; None: 6000 a spot, 12 a bin
    zero_read_fraction: float = 0.004  # spots in tissue that caught nothing; at least two unless 0
    clusters: int = 6
    region_um: float = 280.0          # scale at which tubules, stroma and lymphoid tissue alternate
    jpeg_quality: int = 90
    margin_um: float | None = None    # between the array's border and the tissue, on average; None: 8 % of the shorter side, 20 to 400
    rim_um: float = 0.0               # glass about the array, added to width and height
    repeat_um: float = 0.0            # tissue repeats, mirrored, after this length (rounded up to whole tiles); 0: never

    def __post_init__(self):
        limits = {"width_um": (300, 50_000), "height_um": (300, 50_000), "mpp": (0.1, 2), "genes": (30, 40_000), "slide_effect": (0, 2),
                  "zero_read_fraction": (0, 0.5), "clusters": (1, 50), "region_um": (50, 5000), "jpeg_quality": (30, 100),
                  "rim_um": (0, 20_000)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"--{name.replace('_', '-')}", f"{low:g} to {high:g}", str(getattr(self, name)))
        if self.platform not in PLATFORMS:
            raise OptionError("--platform", f"one of {', '.join(PLATFORMS)}", self.platform)
        for name in ("seed", "biology_seed", "stain_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:          # no more fits the noise of the tissue
                raise OptionError(f"--{name.replace('_', '-')}", "0 to 4294967295", str(getattr(self, name)))
        if self.umis is not None and not 0 < self.umis <= MOST_UMIS:
            raise OptionError("--umis", f"a number above 0, up to {MOST_UMIS:,}", str(self.umis))
        widest = min(self.width_um, self.height_um) / 4
        if self.margin_um is not None and not 10 <= self.margin_um <= widest:
            raise OptionError("--margin-um", f"10 to {widest:g}, a quarter of the shorter side", str(self.margin_um))
        if self.repeat_um and not 300 <= self.repeat_um <= 10_000:
            raise OptionError("--repeat-um", "0 (never) or 300 to 10000", str(self.repeat_um))
        if not self.sample_id or "/" in self.sample_id:
            raise OptionError("--sample-id", "a name without a slash", repr(self.sample_id))

    @property
    def is_hd(self) -> bool:
        return self.platform == "visium-hd"

    @property
    def slide_um(self) -> tuple[float, float]:
        """Width and height of the slide with its rim."""
        return self.width_um + 2 * self.rim_um, self.height_um + 2 * self.rim_um

    @property
    def mean_umis(self) -> float:
        return self.umis if self.umis is not None else (12.0 if self.is_hd else 6000.0)
