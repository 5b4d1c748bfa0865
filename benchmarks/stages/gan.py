"""Take one part of the GAN's step in this process, one way, as often as asked; run by `benchmarks/gan.py`.

`python -m benchmarks.stages.gan JOB`, the job as JSON. After building and a warm-up every line on stdin asks for one go over a batch,
answered with a line of JSON: its wall and processor time. At the end of stdin the last line gives the peak memory. Data and weights
are made on the spot: noise for patches, 10 % of the genes seen, frozen networks with random weights.

Ours computes as `train_gan.py` sets it up: in bfloat16 and channels-last on a GPU, compiled if asked. The plain way stays float32, eager
and NCHW; a GPU's libraries are told the same for all ways, so that its float32 products are TF32 where ours are bfloat16.
"""
from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stages.plain_gan import PlainGenerator, PlainStep
from networks.clip import CLIP, ClipModelConfig
from networks.discriminator import Discriminator
from networks.encoder_specs import ENCODERS
from networks.generator import Generator
from networks.histo_models import Encoder, build_body, build_encoder
from training.gan_config import GanConfig, resolve
from training.gan_parts import TrainingData
from training.gan_speed import Precision, default_precision, prepare_discriminator, prepare_generator, set_up_gpu
from training.gan_step import GanStep
from training.guidance import clip_guidance, wanted_prompts

SEEN_SHARE = 0.1
PLAIN, ONE_PASS, TWO_PASSES = "plain", "ours", "ours, two passes"


@dataclass(frozen=True)
class Job:
    """What is measured, on what and at which size."""

    way: str             # ours | ours, two passes | plain
    part: str            # generator | discriminator | guidance | step | step with guidance
    device: str = "cpu"
    cfg: str = "lite"
    img_resolution: int = 64
    batch: int = 8
    backbone: str = "lunit_dino_vits16"
    tower: str = "uni"
    genes: int = 18_248
    batch_gpu: int | None = None     # this and what follows: None is what a run has by default
    compile: str | None = None
    fp32: bool | None = None
    workers: int | None = None

    @property
    def config(self) -> GanConfig:
        guidance = 0.2 if "guidance" in self.part else 0.0
        ours = {} if self.way == PLAIN else {"precision": self.precision, "compile": self.compile}
        return resolve("best", self.cfg, img_resolution=self.img_resolution, batch=self.batch, backbone=self.backbone,
                       shared_pass=self.way == ONE_PASS, clip_weight=guidance, blur_init=2.0, batch_gpu=self.batch_gpu,
                       workers=self.workers, **ours)

    @property
    def precision(self) -> Precision:
        """What the device's libraries are told, and what ours computes in."""
        return default_precision(self.device, self.fp32)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


class StillGenerator(nn.Module):
    """In a generator's place: the same patches whatever is asked, with a gradient, so that what is left of a step is D's."""

    def __init__(self, generator: Generator, n_images: int):
        super().__init__()
        self.config, self.noise_size, self.mapping_network = generator.config, generator.noise_size, generator.mapping_network
        side = self.config.img_resolution
        self.images = nn.Parameter(torch.rand(n_images, 3, side, side) * 2 - 1)

    def forward(self, z: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.images[:len(z)]


def random_encoder(name: str) -> Encoder:
    """An image encoder of the real shapes; only `random_tiny` has weights of its own."""
    if name == "random_tiny":
        return build_encoder(name)
    return Encoder(name, build_body(name, ENCODERS[name]), ENCODERS[name], "random").eval()


def build_clip(job: Job) -> CLIP:
    """The published gene encoder, with the image tower where it guides."""
    tower = random_encoder(job.tower)
    clip = CLIP(ClipModelConfig(), [f"gene{number}" for number in range(job.genes)], feature_width=tower.width,
                image_encoder=tower if "guidance" in job.part else None)
    return clip.eval().requires_grad_(False).to(job.device)


def build_data(job: Job, clip: CLIP | None) -> TrainingData:
    """Noise patches; their prompts are embedded with `clip` or, where none is needed, drawn."""
    n_spots, order = max(job.batch, 32), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n_spots, 3, job.img_resolution, job.img_resolution), dtype=torch.uint8, generator=order)
    expression = sp.random(n_spots, job.genes, SEEN_SHARE, format="csr", dtype=np.float32, random_state=np.random.default_rng(0))
    if clip is None:
        prompts = F.normalize(torch.randn(n_spots, ClipModelConfig().projection, generator=order), dim=1)
    else:
        prompts = clip.embed_expression(expression).cpu()
    return TrainingData(images, prompts, expression=expression).to(job.device)


def build_generator(job: Job, data: TrainingData) -> Generator:
    """On the CPU, and set up to compute as a run sets it up."""
    torch.manual_seed(0)
    generator = (PlainGenerator if job.way == PLAIN else Generator)(job.config.generator(data.prompts.shape[1]))
    if job.way != PLAIN:
        prepare_generator(generator, precision=job.config.precision, compiled=job.config.compile, on_gpu=job.on_gpu)
    return generator


def build_step(job: Job, data: TrainingData, clip: CLIP | None) -> GanStep:
    """Both networks and their optimisers; a still generator where D alone is measured."""
    config = job.config
    generator = build_generator(job, data)
    discriminator = Discriminator(random_encoder(job.backbone), data.prompts.shape[1], config.img_resolution, cond_norm=config.cond_norm,
                                  statistics=config.statistics, prompt_bias=config.prompt_bias)
    if job.way != PLAIN:
        prepare_discriminator(discriminator, precision=config.precision, compiled=config.compile, penalised=config.r1_weight > 0)
    for network in (generator, discriminator):
        network.condition.fit(data.prompts.cpu())
    if job.part == "discriminator":
        generator = StillGenerator(generator, config.batch_gpu)
    made = (PlainStep if job.way == PLAIN else GanStep)(config, generator.to(job.device), discriminator.to(job.device).train(), data, clip)
    if job.way == PLAIN:
        made.encoder = clip
    return made


def build_go(job: Job) -> Callable[[], None]:
    """A function that takes the part once over a batch."""
    plain = job.way == PLAIN
    clip = build_clip(job) if "guidance" in job.part or (plain and job.part != "generator") else None
    data = build_data(job, clip)
    if job.part == "guidance":
        return lambda: take_guidance(job, clip, data)
    if job.part == "generator":
        generator = build_generator(job, data).to(job.device).train()
        return lambda: take_generator(job, generator, data)
    gan, weight, steps = build_step(job, data, clip), job.config.clip_weight, count()     # a step is drawn ahead by its number
    if job.part == "discriminator":
        return lambda: gan.gradients(next(steps), sigma=1.0, clip_weight=0.0) and gan.d_optimiser.step()
    return lambda: gan.gradients(next(steps), sigma=1.0, clip_weight=weight) and gan.move(job.config.g_lr, job.config.d_lr)


def take_generator(job: Job, generator: Generator, data: TrainingData) -> None:
    """Forward and back; and forward once more for D's loss, where that has a pass of its own."""
    for start in range(0, job.batch, job.config.batch_gpu):
        c = data.prompts[start:start + job.config.batch_gpu]
        z, noise = (torch.randn(len(c), width, device=c.device) for width in (generator.config.z_dim, generator.noise_size))
        if job.way != ONE_PASS:
            with torch.no_grad():
                generator(z, c, noise=noise)
        generator(z, c, noise=noise).square().mean().backward()
    generator.zero_grad()


def take_guidance(job: Job, clip: CLIP, data: TrainingData) -> None:
    """The image tower, forward and back to the images."""
    rows = np.arange(job.batch)
    wanted = wanted_prompts(data.prompts, rows, in_pairs=False)
    for start in range(0, job.batch, job.config.batch_gpu):
        part = slice(start, start + job.config.batch_gpu)
        images = (data.images[rows[part]].float() / 127.5 - 1).requires_grad_()
        clip_guidance(clip, "spherical", images, torch.full((len(images), 3), 0.5), wanted, part,
                      reduced=job.config.precision == "bf16").backward()


def wait_for(job: Job) -> None:
    if job.on_gpu:
        torch.cuda.synchronize()


def main(job: Job) -> None:
    set_up_gpu(job.precision, search_kernels=True)
    go = build_go(job)
    for _ in range(3 if job.on_gpu else 1):
        go()
    wait_for(job)
    if job.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    print("ready", flush=True)
    for _ in sys.stdin:
        started, cpu_started = time.perf_counter(), time.process_time()
        go()
        wait_for(job)
        print(json.dumps({"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_started}), flush=True)
    peak = torch.cuda.max_memory_allocated() if job.on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_gib": peak / 2 ** 30}), flush=True)


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
