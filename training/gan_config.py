"""Everything one GAN run was told, as one table; sizes and presets are tables of the same fields.

kimg = thousands of real images shown to the discriminator: the run's clock.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from networks.discriminator import GROUP
from networks.generator import GeneratorConfig
from networks.layers import CondNormKind
from preprocessing.errors import OptionError
from training.finite import MAX_RATE
from training.gan_losses import GuidanceKind, Schedule
from training.gan_speed import Compile, Precision
from training.train_modes import TRAIN_MODES, first_trained_px

#            channels at resolution r: min(cbase // r, cmax); residual pairs; GroupNorm groups
SIZES = {
    "small": {"cbase": 1024, "cmax": 96, "res_blocks": 1, "norm_groups": 8,      # demo, tests, small machines: runs of a few kimg
              "g_lr": 0.005, "d_lr": 0.004},
    "lite": {"cbase": 32768, "cmax": 512, "res_blocks": 2, "norm_groups": 32},
    "full": {"cbase": 65536, "cmax": 2048, "res_blocks": 3, "norm_groups": 32},
}
# `reference` is the published method with its accidents; `best` is ours
PRESETS = {
    "reference": {
        "cond_norm": "l2", "statistics": "imagenet", "backbone": "lunit_dino_vits16", "g_lr": 0.002, "d_lr": 0.002, "noise_init": 0.0,
        "flips": False, "max_shift_px": 0, "diversity_weight": 0.0, "cond_noise": 0.0, "shared_pass": False, "colour_strength": 1.0,
        "clip_weight_times_batch_gpu": True, "cond_dropout": 0.8, "blur_fade_kimg": 1000.0, "prompt_bias": 0.0, "colour_start": False,
        "mismatch_weight": 0.0, "clip_loss": "spherical", "augment_target": None, "r1_weight": 0.0, "emas": "1",
    },
    "best": {
        "cond_norm": "standardize", "statistics": "own", "backbone": "efficientnet_lite0", "noise_init": 0.2,
        "flips": True, "max_shift_px": 4, "diversity_weight": 0.0, "cond_noise": 0.1, "shared_pass": True, "colour_strength": 0.5,
        "clip_weight_times_batch_gpu": False, "cond_dropout": 0.0, "prompt_bias": 1.0, "colour_start": True,
    },
}


# where prompts come from, and what of a preset does not apply there
ENCODERS = {
    "clip": {},                                # frozen CLIP weights
    "mlp": {"cond_dropout": 0.0},              # an encoder trained with the generator, with a dropout of its own
    "ready": {"cond_dropout": 0.0},            # embeddings that were handed over
    "none": {"cond_dropout": 0.0, "cond_noise": 0.0, "prompt_bias": 0.0, "cond_norm": "l2"},   # nowhere: unconditional
}
TEXT_ENCODER_LR = 3e-6      # of the condition encoder trained alone, as published

POSITIVE = ("batch", "kimg", "budget_minutes", "tick", "snap", "g_lr", "d_lr", "max_bad_steps", "augment_kimg", "r1_interval")
ANY_SIGN = ("prompt_bias",)
MAX_SEED = 2 ** 63 - 1


@dataclass(frozen=True)
class GanConfig:
    """One run. Built by `resolve`, which lays the preset and the size under what the user said."""

    img_resolution: int                       # px
    batch: int                                # images per step over all micro-batches
    batch_gpu: int = 8                        # images per micro-batch
    cbase: int = 32768                        # generator's channels at resolution r: min(cbase // r, cmax)
    cmax: int = 512
    res_blocks: int = 2
    norm_groups: int = 32
    noise_init: float = 0.0                   # generator's noise strength at the start
    cond_norm: CondNormKind = "l2"            # scaling of prompt embeddings, in both networks
    encoder: Literal["clip", "mlp", "ready", "none"] = "clip"   # where prompts come from: a key of ENCODERS
    train_mode: str = "all"                   # what of the generator is trained: one of TRAIN_MODES
    backbone: str = "efficientnet_lite0"      # discriminator's encoder, in networks/encoder_specs.py
    backbone_weights: str | None = None       # its weight file
    backbone_px: int = 0                      # side the backbone sees; 0 = its own (ViT) or the image's (convolutional)
    statistics: Literal["own", "imagenet"] = "own"   # mean and deviation in front of the backbone
    prompt_bias: float = 0.0                  # start of the heads' prompt bias: 1 = judge realism whatever the prompt, from the start
    colour_start: bool = False                # the generator begins at the mean colour of the real patches
    g_lr: float = 0.002                       # Adam (0, .99), eps 1e-8
    d_lr: float = 0.002
    g_lr_schedule: Literal["const", "step"] = "const"
    d_lr_schedule: Literal["const", "step"] = "const"
    clip_weight: float = 0.0                  # guidance by the CLIP image tower
    clip_weight_times_batch_gpu: bool = False   # the original does not divide guidance by its micro-batch: 8 x at its batch_gpu of 8
    clip_schedule: Schedule = "const"         # over --kimg, whatever the wall time
    clip_loss: GuidanceKind = "spherical"     # infonce: the own prompt among those of the global batch, at CLIP's temperature
    rec_weight: float = 0.0                   # mean squared error to the paired patch
    diversity_weight: float = 0.0             # pressure on two images of one prompt to differ as two real neighbours do
    cond_dropout: float = 0.0                 # dropout of the gene encoder where it embeds prompts for the generator in training
    cond_noise: float = 0.0                   # noise on prompt embeddings in training, in deviations between prompts
    flips: bool = True                        # real patches in their eight flips and quarter turns
    max_shift_px: int = 0                     # real patches moved by up to this many px, edges mirrored
    colour_strength: float = 1.0              # of DiffAugment's colour part
    augment_target: float | None = None       # None: every image is augmented. Else so many that E[sign D(real)] comes to this
    augment_kimg: float = 500.0               # over which the share of augmented images can move from 0 to 1
    mismatch_weight: float = 0.0              # real patches with the genes of an unlike spot, as a further negative
    r1_weight: float = 0.0                    # gradient penalty on the backbone's features of real patches
    r1_interval: int = 16                     # steps between penalties; each counts so many times
    shared_pass: bool = True                  # one pass serves both losses; real and generated share batch statistics
    blur_init: float = 32.0                   # px at the start
    blur_fade_kimg: float | None = None       # None: a tenth of the run
    kimg: float = 25000.0                     # length of the run
    budget_minutes: float | None = None       # stop at this wall time, whichever comes first
    tick: float = 4.0                         # kimg between status lines
    snap: int = 100                           # ticks between snapshots
    emas: str = "1"                           # averages kept: multiples of the published half-life, 1 among them
    seed: int = 0
    max_bad_steps: int = 10                   # steps with NaN or infinite numbers in a row that end the run
    precision: Precision = "fp32"             # bf16: convolutions and frozen towers, weights stay float32
    compile: Compile = "off"                  # blocks: every resolution, head and the backbone; max: with a search for fast kernels
    workers: int = 3                          # threads that draw random numbers and read patches ahead

    def __post_init__(self):
        self._require_numbers()
        self.generator(c_dim=1)               # checks resolution and channels
        self._require_prompts()
        self._require_train_mode()
        if self.batch_gpu % GROUP or self.batch_gpu < GROUP:
            raise OptionError("--batch-gpu", f"a multiple of {GROUP} (batch norm works in groups of {GROUP})", str(self.batch_gpu))
        if self.batch % self.batch_gpu or self.batch < 1:
            raise OptionError("--batch", f"a multiple of --batch-gpu {self.batch_gpu}", str(self.batch))
        if self.augment_target is not None and self.augment_target > 1:
            raise OptionError("--augment-target", "0 up to 1, the mean of signs", str(self.augment_target))
        if self.clip_loss != "spherical" and not self.clip_weight:
            raise OptionError("--clip-loss", "a --clip-weight above 0 to give it", f"{self.clip_loss} with --clip-weight 0")
        for name, choices in (("precision", get_args(Precision)), ("compile", get_args(Compile))):
            if getattr(self, name) not in choices:
                raise OptionError(f"--{name}", f"one of {', '.join(choices)}", getattr(self, name))
        _ = self.ema_multiples                # checks them
        if self.max_shift_px >= self.img_resolution:
            raise OptionError("--max-shift-px", f"less than the patch's {self.img_resolution} px", str(self.max_shift_px))

    def _require_numbers(self) -> None:
        """Refuse NaN, infinite and negative numbers, and zero where it makes no sense."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            expected = ("more than 0" if name in POSITIVE else "any finite number" if name in ANY_SIGN
                        else "0 up to 1" if name == "cond_dropout" else f"0 up to {MAX_SEED}" if name == "seed" else "0 or more")
            holds = isfinite(value) and (value > 0 if name in POSITIVE else value >= 0 or name in ANY_SIGN)
            if not holds or (name == "cond_dropout" and value >= 1) or (name == "seed" and value > MAX_SEED):
                raise OptionError(f"--{name.replace('_', '-')}", expected, str(value))
        for name in ("g_lr", "d_lr"):
            if getattr(self, name) > MAX_RATE:
                raise OptionError(f"--{name.replace('_', '-')}", f"at most {MAX_RATE:g}", str(getattr(self, name)))

    def _require_prompts(self) -> None:
        """Refuse what needs prompts, or other prompts than there are."""
        if self.encoder not in ENCODERS:
            raise OptionError("--encoder", f"one of {', '.join(ENCODERS)}", self.encoder)
        if self.cond_dropout and self.encoder != "clip":
            raise OptionError("--cond-dropout", "0 where frozen CLIP weights do not embed the prompts", str(self.cond_dropout))
        if self.clip_weight and self.encoder not in ("clip", "ready"):
            raise OptionError("--clip-weight", "0 unless prompts are embeddings of the CLIP weights that guide", str(self.clip_weight))
        if self.encoder == "none":
            for name in ("cond_noise", "diversity_weight", "prompt_bias", "mismatch_weight"):
                if getattr(self, name):
                    raise OptionError(f"--{name.replace('_', '-')}", "0 without prompts", str(getattr(self, name)))
            if self.cond_norm != "l2":
                raise OptionError("--cond-norm", "l2 (of nothing) without prompts", self.cond_norm)
        if self.mismatch_weight and self.encoder == "mlp":
            raise OptionError("--mismatch-weight", "0 with --encoder mlp, whose prompts move in training", str(self.mismatch_weight))
        if self.cond_norm == "standardize" and self.encoder == "mlp":
            raise OptionError("--cond-norm", "l2 or scaled with --encoder mlp, whose mean embedding moves in training", self.cond_norm)

    def _require_train_mode(self) -> None:
        if self.train_mode not in TRAIN_MODES:
            raise OptionError("--train-mode", f"one of {', '.join(TRAIN_MODES)}", self.train_mode)
        if self.train_mode == "text_encoder" and self.encoder != "mlp":
            raise OptionError("--train-mode", "text_encoder with --encoder mlp alone: CLIP weights stay frozen", f"encoder {self.encoder}")
        if first_trained_px(self.train_mode) > self.img_resolution:
            raise OptionError("--train-mode", f"to freeze less than the {self.img_resolution} px of --img-resolution", self.train_mode)

    @property
    def guidance_weight(self) -> float:
        """`clip_weight`, times the micro-batch where the published method is reproduced."""
        return self.clip_weight * (self.batch_gpu if self.clip_weight_times_batch_gpu else 1)

    @property
    def ema_multiples(self) -> tuple[float, ...]:
        """`emas` as numbers: multiples of the published half-life."""
        try:
            multiples = tuple(dict.fromkeys(float(part) for part in self.emas.split(",")))
        except ValueError:
            multiples = ()
        if 1.0 not in multiples or not all(isfinite(multiple) and multiple > 0 for multiple in multiples):
            raise OptionError("--emas", "numbers above 0 with commas between, 1 among them, as 0.5,1,2", self.emas)
        return multiples

    def generator(self, c_dim: int) -> GeneratorConfig:
        """The generator of this run for prompts of width `c_dim`."""
        return GeneratorConfig(img_resolution=self.img_resolution, c_dim=c_dim, cbase=self.cbase, cmax=self.cmax,
                               res_blocks=self.res_blocks, norm_groups=self.norm_groups,
                               noise_init=self.noise_init, cond_norm=self.cond_norm)


def resolve(preset: str, size: str, **said: object) -> GanConfig:
    """Lay size (`custom`: none), preset, what follows from the encoder and the train mode, and what the user said over each other;
    None means not said."""
    if preset not in PRESETS:
        raise OptionError("--preset", f"one of {', '.join(PRESETS)}", preset)
    if size != "custom" and size not in SIZES:
        raise OptionError("--cfg", f"one of {', '.join([*SIZES, 'custom'])}", size)
    spoken = {name: value for name, value in said.items() if value is not None}
    chosen = {**SIZES.get(size, {}), **PRESETS[preset], **ENCODERS.get(spoken.get("encoder", "clip"), {})}
    if spoken.get("encoder") == "mlp" and chosen["cond_norm"] == "standardize":
        chosen["cond_norm"] = "scaled"        # its mean embedding moves; the length of its unit rows does not
    if spoken.get("train_mode") == "text_encoder":
        chosen["g_lr"] = TEXT_ENCODER_LR
    return GanConfig(**{**chosen, **spoken})
