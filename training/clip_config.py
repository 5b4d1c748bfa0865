"""The configuration of `train_clip.py`: Hydra's YAML merged onto these tables, so that an unknown key or a word for a number is refused.

The defaults are the published values. Relative paths mean the folder the command was started in.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from networks.clip import ClipModelConfig
from preprocessing.errors import OptionError, require_bearable
from preprocessing.inputs import path_list
from training.augment import AugmentConfig
from training.finite import MAX_DECAY, MAX_RATE
from training.patch_cache import AUTO_CACHE, cache_place
from training.ranks import LONGEST_MINUTES
from training.sample_sheet import SampleFiles, read_sample_sheet, sample_files

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
MOST_THREADS, MOST_SEED = 1024, 2**32 - 1        # of a seed what NumPy takes
LOGGERS = ("csv", "tensorboard", "wandb")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "32", "16", "bf16")     # weights and expression stay float32


@dataclass
class DataConfig:
    train_gex: Any = None            # gex_filt.h5ad, or several: a list or a comma list
    train_image_dir: Any = None      # patch folder or imgs.h5, as many
    val_gex: Any = None              # none = a spatial block of the training samples is held out
    val_image_dir: Any = None
    samples: str | None = None       # sample sheet (CSV) in place of the four above
    max_size: int | None = 10000     # at most this many training spots, drawn at random
    patch_px: int = 128              # patches are brought to this side
    target_sum: Any = "median"       # library size after normalisation: median of each sample, or a number
    already_normalised: bool = False
    val_fraction: float = 0.15       # of each sample, when no validation sample is given; 0 = train on all, without validation
    val_buffer_px: float | None = None   # level-0 px between training and held-out spots; none = one patch
    cache_dir: str | None = "auto"   # packed patches: a folder | auto = .patch_cache beside the first images, if many | none = in memory
    loader_threads: int | None = None    # draw batches ahead of the step; none = 2 on a GPU, 0 on a CPU. Results do not depend on it

    def __post_init__(self):
        for name in ("train_gex", "train_image_dir", "val_gex", "val_image_dir"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, ",".join(map(str, value)))
        self.cache_dir = cache_place(self.cache_dir)
        if self.target_sum != "median":
            try:
                self.target_sum = float(self.target_sum)
            except (TypeError, ValueError) as error:
                raise OptionError("data.target_sum", "median or a number", str(self.target_sum)) from error
            if not 0 < self.target_sum < float("inf"):       # false for NaN, too
                raise OptionError("data.target_sum", "median or a number above 0", str(self.target_sum))
        if self.val_buffer_px is not None and not self.val_buffer_px >= 0:
            raise OptionError("data.val_buffer_px", "0 or more, or null", str(self.val_buffer_px))
        if self.loader_threads is not None and self.loader_threads < 0:
            raise OptionError("data.loader_threads", "0 or more, or null", str(self.loader_threads))
        if self.patch_px < 8:
            raise OptionError("data.patch_px", "at least 8", str(self.patch_px))
        if not 0 <= self.val_fraction < 1:
            raise OptionError("data.val_fraction", "0 up to 1", str(self.val_fraction))

    def patch_cache(self, resolve: Callable[[str], Path]) -> Path | str | None:
        """Where `ImageGeneDataset.open_patches` keeps packed patches."""
        return self.cache_dir if self.cache_dir in (None, AUTO_CACHE) else resolve(self.cache_dir)

    def train_and_val(self, resolve: Callable[[str], Path]) -> tuple[list[SampleFiles], list[SampleFiles]]:
        """The samples to learn from and those to validate on (perhaps none); `resolve` makes the user's paths absolute."""
        if self.samples:
            sheet = read_sample_sheet(resolve(self.samples))
            return [sample for sample in sheet if sample.split == "train"], [sample for sample in sheet if sample.split == "val"]
        if not self.train_gex or not self.train_image_dir:
            raise OptionError("data", "data.train_gex and data.train_image_dir, or data.samples", "neither")
        if bool(self.val_gex) != bool(self.val_image_dir):
            raise OptionError("data", "both data.val_gex and data.val_image_dir, or neither", "one of them")
        def files(images: str, gex: str) -> list[SampleFiles]:
            return sample_files(*([resolve(str(path)) for path in path_list(text)] for text in (images, gex)))

        return files(self.train_image_dir, self.train_gex), files(self.val_image_dir, self.val_gex) if self.val_gex else []


@dataclass
class ImageConfig:
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cache_features: int = 0          # K > 0: the frozen tower sees K views of every patch once, training draws from them
    cache_dir: str | None = None     # keep these features on disk, keyed by patches, views and tower; none = in memory

    def __post_init__(self):
        if self.cache_features < 0:
            raise OptionError("image.cache_features", "0 (off) or the number of views", str(self.cache_features))
        self.cache_dir = cache_place(self.cache_dir)
        if self.cache_dir == AUTO_CACHE:
            raise OptionError("image.cache_dir", "a folder, or none", AUTO_CACHE)


@dataclass
class OptimizerConfig:
    name: str = "adamw"              # adamw | adam | sgd | rmsprop
    lr: float = 5e-6
    weight_decay: float = 0.01
    schedule: str = "constant"       # constant (published) | one_cycle

    def __post_init__(self):
        for name, choices in (("name", ("adamw", "adam", "sgd", "rmsprop")), ("schedule", ("constant", "one_cycle"))):
            if getattr(self, name) not in choices:
                raise OptionError(f"optimizer.{name}", f"one of {', '.join(choices)}", str(getattr(self, name)))
        if not 0 < self.lr <= MAX_RATE:
            raise OptionError("optimizer.lr", f"above 0, at most {MAX_RATE:g}", str(self.lr))
        if not 0 <= self.weight_decay <= MAX_DECAY:      # false for NaN, too
            raise OptionError("optimizer.weight_decay", f"0 up to {MAX_DECAY:g}", str(self.weight_decay))


@dataclass
class TrainerConfig:
    max_epochs: int = 1000
    batch_size: int = 128            # over all devices
    accelerator: str = "auto"        # auto | cpu | gpu
    devices: Any = 1                 # number, or auto
    num_nodes: int = 1               # machines; each has `devices`
    timeout_minutes: float = 30.0    # a process that leaves the others waiting for so long ends the run
    precision: str | None = None     # none = bf16-mixed on a GPU, 32-true on a CPU
    contrast: str = "all"            # candidates of a spot in its batch: all (published) | within_sample
    batch_mmd: float = 0.0           # weight of the distance between the samples of a batch (sample_mmd); 0 = off
    val_every_steps: int = 10
    limit_val_batches: int = 50
    save_top: int = 5                # best checkpoints kept, beside the last; 0: none but one at the end
    select: str = "best"             # weights that the run ends with: best (of the validation loss) | last
    log_every_steps: int = 10
    num_threads: int | None = None   # CPU threads at most; none = as PyTorch decides (cores, OMP_NUM_THREADS)
    progress_bar: bool = True

    def __post_init__(self):
        for name, least in (("max_epochs", 1), ("batch_size", 2), ("num_nodes", 1), ("val_every_steps", 1), ("limit_val_batches", 1),
                            ("save_top", 0), ("log_every_steps", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"trainer.{name}", f"at least {least}", str(getattr(self, name)))
        if self.precision is not None and self.precision not in PRECISIONS:
            raise OptionError("trainer.precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        if not 0 < self.timeout_minutes <= LONGEST_MINUTES:
            raise OptionError("trainer.timeout_minutes", f"above 0, up to {LONGEST_MINUTES:g} (a week)", str(self.timeout_minutes))
        if self.num_threads is not None and not 1 <= self.num_threads <= MOST_THREADS:
            raise OptionError("trainer.num_threads", f"1 to {MOST_THREADS}, or null", str(self.num_threads))
        for name, choices in (("accelerator", ACCELERATORS), ("select", ("best", "last")), ("contrast", ("all", "within_sample"))):
            if getattr(self, name) not in choices:
                raise OptionError(f"trainer.{name}", f"one of {', '.join(choices)}", getattr(self, name))
        if not (self.batch_mmd >= 0 and isfinite(self.batch_mmd)):
            raise OptionError("trainer.batch_mmd", "0 (off) or more, finite", str(self.batch_mmd))


@dataclass
class ClipConfig:
    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    model: ClipModelConfig = field(default_factory=ClipModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 71
    logger: Any = "csv,tensorboard"  # any of csv, tensorboard, wandb; none
    out_dir: str = "runs"            # receives 00000-clip, 00001-clip, ...
    run_dir: str | None = None       # this very folder instead
    ckpt_path: str | None = None     # resume: a checkpoint file, last (of run_dir), or auto: last if there is one, else a new run

    def __post_init__(self):
        if not 0 <= self.seed <= MOST_SEED:
            raise OptionError("seed", f"0 to {MOST_SEED}", str(self.seed))
        if isinstance(self.logger, str):
            self.logger = [name.strip() for name in self.logger.split(",") if name.strip() not in ("", "none")]
        strangers = [name for name in self.logger or [] if name not in LOGGERS]
        if strangers:
            raise OptionError("logger", f"any of {', '.join(LOGGERS)}", ", ".join(strangers))
        if "wandb" in (self.logger or []) and find_spec("wandb") is None:
            raise OptionError("logger=wandb", "the package wandb (pip install wandb)", "it is not installed")
        if self.ckpt_path in ("last", "auto") and not self.run_dir:
            raise OptionError(f"ckpt_path={self.ckpt_path}", "run_dir=<the run folder to continue>", "no run_dir")


def clip_config(loaded: DictConfig | Mapping) -> ClipConfig:
    """Hydra's or a plain mapping -> `ClipConfig`; whatever does not fit is one line (exit 2)."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ClipConfig), loaded)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, OptionError):
            raise error.__cause__ from error
        reason = str(error.msg if hasattr(error, "msg") and error.msg else error).strip().splitlines()[0]
        key = getattr(error, "full_key", None) or "config"
        raise OptionError(str(key), "a key and a value of train_clip.py's configuration", reason) from error
    _require_bearable(config)
    return config


def _require_bearable(part: Any, prefix: str = "") -> None:
    """As every command's options, every number here is finite and none so large that it overflows."""
    for name, value in vars(part).items():
        if is_dataclass(value):
            _require_bearable(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            require_bearable(prefix + name, value, bounded=name == "seed")


def from_launch_folder(path: str | Path, launch_folder: Path) -> Path:
    """A path as the user meant it: relative ones start where the command was started."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else launch_folder / path
