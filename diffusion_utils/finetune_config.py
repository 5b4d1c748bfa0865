"""What a fine-tune is told. Names are those of diffusers' text-to-image example wherever it has one."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Literal, get_args

from diffusion_utils.denoisers import SIZES, Size
from diffusion_utils.noising import Prediction
from diffusion_utils.prompts import PromptTokens
from diffusion_utils.sampling import Solver
from preprocessing.errors import OptionError
from training.finite import MAX_DECAY, MAX_RATE
from training.image_metrics import CLIP_SCORE, parse_metrics
from training.ranks import LONGEST_MINUTES

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
MAY_CHANGE = ("learning_rate", "output_dir", "train_data_dir", "dataset_embs", "num_train_epochs", "max_train_steps", "checkpointing_steps",
              "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompts", "validation_steps", "val_data_dir", "val_embs",
              "guidance_scale", "report_to", "push_to_hub", "dataloader_num_workers", "cache_dir", "latent_cache", "max_bad_steps",
              "pretrained_model_name_or_path", "pretrained_vae_path", "progress", "compile", "uncond_embedding", "metrics",
              "timeout_minutes")   # by a continuation
MOST_STEPS = 99_999_999     # that the names of checkpoints have digits for


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One run of `train_diffusion`. What is learned from is compared by content when a run goes on, not by its path."""

    train_data_dir: str                        # patch folder or imgs.h5; several by commas
    dataset_embs: str                          # .npy for each
    output_dir: Path
    pretrained_model_name_or_path: str | None = None
    from_scratch: Size | None = None
    pretrained_vae_path: str | None = None
    pixel_space: bool = False                  # no autoencoder
    resolution: int = 256                      # px
    prompt_tokens: PromptTokens = "learned"
    n_tokens: int = 8                          # of learned prompts
    fresh_prompts: bool = False                # forget what a base of ours learned of them
    prediction_type: Prediction | None = None  # None: the base's own; v_prediction from scratch
    train_batch_size: int = 16                 # images of a micro-batch on each process
    gradient_accumulation_steps: int = 1       # micro-batches a step
    num_train_epochs: int = 15
    max_train_steps: int | None = None         # instead of epochs
    gradient_checkpointing: bool = False
    learning_rate: float | None = None         # None: 1e-5 for a base, 1e-4 for adapters, 3e-4 from scratch
    lr_scheduler: Schedule = "constant"
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    snr_gamma: float | None = 5.0              # None: every timestep weighs the same
    use_ema: bool = True
    ema_decay: float = 0.9999
    power_ema: bool = False                    # keep averages whose length is chosen afterwards
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    mixed_precision: Literal["no", "bf16"] | None = None   # None: bf16 on a GPU
    lora_rank: int | None = None
    classifier_free_guidance: bool = True      # learn the null prompt too
    p_uncond: float = 0.1                      # of each sample on its own
    uncond_embedding: str = "mean"             # mean, zeros or an .npy
    shuffle_prompts: bool = False              # the null experiment
    orientations: bool = True                  # show flips and quarter turns
    latent_cache: bool = True
    cache_dir: Path | None = None              # of latents; None: in the run folder
    compile: bool = False
    seed: int = 0
    dataloader_num_workers: int = 2            # threads that read and draw ahead
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None  # latest, or a checkpoint folder
    validation_prompts: str | None = None      # .npy: pictures of these embeddings
    validation_steps: int = 500
    val_data_dir: str | None = None            # held-out patches: loss with their own and with exchanged prompts
    val_embs: str | None = None
    guidance_scale: float = 3.0                # of the pictures
    metrics: str = "none"                      # distances of generated patches to real ones, at validation steps
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    push_to_hub: str | None = None             # owner/name
    max_bad_steps: int = 10
    timeout_minutes: float = 30.0              # that one process waits for another
    progress: bool = True

    def __post_init__(self):
        if (self.pretrained_model_name_or_path is None) == (self.from_scratch is None):
            raise OptionError("--pretrained-model-name-or-path / --from-scratch", "one of them",
                              "none" if self.from_scratch is None else "both")
        if self.from_scratch is not None and self.from_scratch not in SIZES:
            raise OptionError("--from-scratch", f"one of {', '.join(SIZES)}", str(self.from_scratch))
        if self.pixel_space and self.pretrained_vae_path:
            raise OptionError("--pixel-space", "no --pretrained-vae-path", self.pretrained_vae_path)
        if self.from_scratch and not self.pixel_space and not self.pretrained_vae_path:
            raise OptionError("--from-scratch", "an autoencoder (--pretrained-vae-path) or --pixel-space", "neither")
        if self.power_ema and self.lora_rank:
            raise OptionError("--power-ema", "a run that trains all weights", f"--lora-rank {self.lora_rank}")
        if self.from_scratch and self.lora_rank:
            raise OptionError("--lora-rank", "trained weights to adapt (--pretrained-model-name-or-path)", "--from-scratch")
        if (self.val_data_dir is None) != (self.val_embs is None):
            raise OptionError("--val-data-dir / --val-embs", "both or none", "one")
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "checkpointing_steps",
                     "checkpoints_total_limit", "validation_steps", "resolution", "max_bad_steps", "n_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_train_steps", "lora_rank"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "snr_gamma", "max_grad_norm", "timeout_minutes"):
            value = getattr(self, name)
            self._require(name, value is None or (isfinite(value) and value > 0), "a number above 0")
        for name in ("noise_offset", "input_perturbation", "adam_weight_decay", "lr_warmup_steps", "dataloader_num_workers", "seed"):
            self._require(name, isfinite(getattr(self, name)) and getattr(self, name) >= 0, "at least 0")
        self._require("learning_rate", self.learning_rate is None or self.learning_rate <= MAX_RATE, f"at most {MAX_RATE:g}")
        self._require("adam_weight_decay", self.adam_weight_decay <= MAX_DECAY, f"at most {MAX_DECAY:g}")
        self._require("max_train_steps", self.max_train_steps is None or self.max_train_steps <= MOST_STEPS,
                      f"at most {MOST_STEPS:,}")
        self._require("seed", self.seed < 2 ** 62, "less than 2^62")
        self._require("timeout_minutes", self.timeout_minutes <= LONGEST_MINUTES, f"at most {LONGEST_MINUTES:g}")
        Solver(guidance_scale=self.guidance_scale)
        self._require("p_uncond", 0 <= self.p_uncond < 1, "at least 0 and less than 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and less than 1")
        if any(metric.kind == CLIP_SCORE for metric in parse_metrics(self.metrics)):
            raise OptionError("--metrics", "distances, as fd_ENCODER: a run knows no CLIP", CLIP_SCORE)
        self._require("lr_scheduler", self.lr_scheduler in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise OptionError(f"--{name.replace('_', '-')}", expected, str(getattr(self, name)))

    @property
    def dropout(self) -> float:
        """Share of samples that show the null prompt."""
        return self.p_uncond if self.classifier_free_guidance else 0.0

    @property
    def step_size(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-4 if self.from_scratch else 1e-4 if self.lora_rank else 1e-5

    @property
    def record(self) -> dict:
        """Plain JSON of all options."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
