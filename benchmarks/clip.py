"""Time CLIP's training step and its memory: the published model with its tower at every step or cached features, and the alternatives.

Inputs are made on the spot (18,248 genes, 10 % of them seen; 128 px patches), the tower is UNI's ViT-L with random weights, so that
neither data nor weights are needed. A step is what training does: draw the batch, embed both sides, loss, gradients, AdamW. On a GPU
batches are drawn ahead by two threads and the step runs under bf16 autocast, as in training. Every row has a process of its own, so
that its peak memory is its own. On a CPU the tower is timed on 16 patches (it takes 8 at a time anyway) and its time scaled to the
batch. Example: python -m benchmarks.clip --device cuda
"""
from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context

import click

GENES, SEEN_SHARE, PATCH_PX, SPOTS = 18_248, 0.1, 128, 512
UNI_WIDTH, SMALL_WIDTH = 1024, 1280   # features of UNI, and of the small tower of assets/clip_small.yaml
WARM_UP_ROWS = 8                      # on a CPU: allocates the optimiser's state and what the layers keep, at little cost
TOWER_PATCHES = 16                    # on a CPU


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    name: str
    model: dict = field(default_factory=dict)   # differences from the published model
    online: bool = False                        # the tower sees every patch at every step
    fused: bool = True                          # PyTorch's fused AdamW, as in training
    feature_width: int = UNI_WIDTH


PUBLISHED_ONLINE, PUBLISHED_CACHED = "published, online", "published, cached features"
SMALL = {"gene_encoder": "identity", "gene_scaling": "centre", "gene_components": 50, "gene_min_share": 0.5, "gene_dropout": 0.1,
         "feature_dropout": 0.8, "linear_heads": True, "projection": 256, "temperature": 0.2}
WAYS = {way.name: way for way in (
    Way(PUBLISHED_ONLINE, online=True),
    Way(PUBLISHED_CACHED),
    Way("published, cached, AdamW unfused", fused=False),
    Way("bottleneck 256", {"gene_encoder": "bottleneck"}),
    Way("gene_tokens, 256 of 128", {"gene_encoder": "gene_tokens"}),
    Way("pathways, 1,000 of 50 genes", {"gene_encoder": "pathways", "pathways_file": "made on the spot"}),
    Way("clip_small", SMALL, feature_width=SMALL_WIDTH),
)}


@dataclass(frozen=True)
class Timing:
    """What one row measured."""

    step_s: float
    cpu_s: float           # processor time of a step, all threads: what a busy machine does not change much
    images_per_s: float
    peak_gib: float
    weights: int           # trained numbers
    steps: int             # measured


def time_way(name: str, device: str, batch_size: int, steps: int) -> Timing:
    """Build the model of one row, take its steps after a warm-up; called in a process of its own."""
    import torch

    way, on_gpu = WAYS[name], device.startswith("cuda")
    torch.manual_seed(0)
    clip = build_model(way).to(device).train()
    trained = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-6, weight_decay=0.01, fused=way.fused)
    draw = batches_of(way)
    warm_up = [batch_size] * 3 if on_gpu else [WARM_UP_ROWS]
    for rows in warm_up:
        take_step(clip, optimizer, draw(rows), device)
    tower_s, tower_cpu_s = time_tower(clip, draw) if way.online and not on_gpu else (0.0, 0.0)   # of a patch
    draw = draw if on_gpu else without_tower(draw, way.feature_width)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started, cpu_started = time.perf_counter(), time.process_time()
    for batch in drawn_ahead(draw, [batch_size] * steps, threads=2 if on_gpu else 0):
        take_step(clip, optimizer, batch, device)
    if on_gpu:
        torch.cuda.synchronize()
    step_s, cpu_s = (time.perf_counter() - started) / steps, (time.process_time() - cpu_started) / steps
    step_s, cpu_s = step_s + batch_size * tower_s, cpu_s + batch_size * tower_cpu_s
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Timing(step_s, cpu_s, batch_size / step_s, peak / 2 ** 30, sum(parameter.numel() for parameter in trained), steps)


def time_tower(clip, draw: Callable) -> tuple[float, float]:
    """(seconds, CPU seconds) that the tower takes for a patch on this CPU; it is warm."""
    images, _ = draw(TOWER_PATCHES)
    started, cpu_started = time.perf_counter(), time.process_time()
    clip.image_features(images)
    return (time.perf_counter() - started) / TOWER_PATCHES, (time.process_time() - cpu_started) / TOWER_PATCHES


def without_tower(draw: Callable, feature_width: int) -> Callable:
    """The same batches, drawn at the same cost, with ready features in place of images."""
    import torch

    def features_of(batch_size: int) -> tuple:
        seen, expression = draw(batch_size)
        return seen if seen.dim() == 2 else torch.randn(batch_size, feature_width), expression

    return features_of


def build_model(way: Way):
    """A networks.clip.CLIP with random weights; its tower only where it sees patches."""
    import numpy as np

    from networks.clip import CLIP, ClipModelConfig
    from networks.encoder_specs import ENCODERS
    from networks.histo_models import Encoder, build_body

    genes, config, rng = [f"gene{number}" for number in range(GENES)], ClipModelConfig(**way.model), np.random.default_rng(0)
    chosen = [rng.choice(GENES, 50, replace=False) for _ in range(1000)] if config.pathways_file else []
    tower = Encoder("uni", build_body("uni", ENCODERS["uni"]), ENCODERS["uni"], "random") if way.online else None
    return CLIP(config, genes, image_encoder=tower, feature_width=way.feature_width,
                gene_sets={f"pathway{number}": [genes[gene] for gene in members] for number, members in enumerate(chosen)})


def batches_of(way: Way) -> Callable:
    """A function of the batch size that draws (images [-1, 1] (N, 3, H, W) | features (N, F), expression (N, G))."""
    import numpy as np
    import scipy.sparse as sp
    import torch

    from training.augment import AugmentConfig, apply_views, draw_views

    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    expression = sp.random(SPOTS, GENES, SEEN_SHARE, format="csr", dtype=np.float32, random_state=rng)
    if way.online:
        stored = torch.randint(0, 256, (SPOTS, 3, PATCH_PX, PATCH_PX), dtype=torch.uint8, generator=generator)
    else:
        stored = torch.randn(SPOTS, way.feature_width, generator=generator)

    def draw(batch_size: int) -> tuple:
        rows = rng.choice(SPOTS, batch_size, replace=batch_size > SPOTS)
        seen = stored[torch.from_numpy(rows)]
        if way.online:
            seen = apply_views(seen, draw_views(batch_size, AugmentConfig(), generator))
        return seen, torch.from_numpy(expression[rows].toarray())

    return draw


def drawn_ahead(draw: Callable, sizes: list[int], threads: int) -> Iterator:
    """Batches as training's loader gives them."""
    from training.loading import in_order
    return in_order(sizes, draw, threads)


def take_step(clip, optimizer, batch: tuple, device: str) -> None:
    """One step of training, as `training.clip_module.ClipModule` takes it."""
    import torch

    from training.clip_losses import clip_loss

    seen, expression = (part.to(device, non_blocking=True) for part in batch)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        images = clip.encode_images(seen) if seen.dim() == 4 else clip.project_image_features(seen)
        genes = clip.encode_genes(expression)
        loss = clip_loss(images.float(), genes.float(), clip.temperature)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def print_table(found: dict[str, Timing], device: str) -> None:
    """Aligned rows, and what caching is worth."""
    memory = "GPU GiB" if device.startswith("cuda") else "RSS GiB"
    click.echo(f"{'':<34}{'weights':>13}{'steps':>7}{'s a step':>11}{'CPU s':>9}{'images/s':>11}{memory:>9}")
    for name, timing in found.items():
        click.echo(f"{name:<34}{timing.weights:>13,}{timing.steps:>7}{timing.step_s:>11.4f}{timing.cpu_s:>9.3f}{timing.images_per_s:>11,.1f}"
                   f"{timing.peak_gib:>9.2f}")
    if PUBLISHED_ONLINE in found:
        online = found[PUBLISHED_ONLINE]
        for name, timing in found.items():
            if name != PUBLISHED_ONLINE:
                click.echo(f"{name:<34}{timing.images_per_s / online.images_per_s:>10,.1f} x the images/s of {PUBLISHED_ONLINE}"
                           f" ({online.cpu_s / timing.cpu_s:,.1f} x by CPU time)")


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--batch-size", default=128, help="Spots a step; 128 is published.")
@click.option("--steps", default=None, type=click.IntRange(min=1), help="Steps measured a row; none = 3 on a CPU, 30 on a GPU.")
@click.option("--ways", default=";".join(WAYS), help="Rows to measure, separated by semicolons.")
def main(device: str, batch_size: int, steps: int | None, ways: str):
    """Print step time, images/s and peak memory of every row, and what cached features gain over the online tower."""
    steps = steps or (30 if device.startswith("cuda") else 3)
    click.echo(f"{device}, batch {batch_size}, {GENES:,} genes")
    found = {}
    for name in (name.strip() for name in ways.split(";")):
        with get_context("spawn").Pool(1) as alone:
            found[name] = alone.apply(time_way, (name, device, batch_size, steps))
    print_table(found, device)


if __name__ == "__main__":
    main()
