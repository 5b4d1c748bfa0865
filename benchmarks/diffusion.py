"""Count, time and compare the published diffusion recipe and ours: FLOPs and memory of SD-1.4 without its weights, images/s of a small
UNet with random ones, and the pictures of both ways of sampling from weights that you have trained.

FLOPs are those torch's counter sees, on the meta device: training with the autoencoder at every step and gradient checkpointing, 77
tokens (published), against cached latents and 8 tokens (ours); sampling with 50 guided steps against ours. Timings run both ways in one
process, taking turns, on the same weights: what else the machine does falls on both.

    python -m benchmarks.diffusion --parts flops,memory
    python -m benchmarks.diffusion --parts time --device cuda --size sd --side 256
    python -m benchmarks.diffusion --parts quality --model runs/diffusion --prompts emb/gene_clip_emb.npy --real runs/C4/patches
"""
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

SD_UNET = {"sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280),
           "cross_attention_dim": 768, "attention_head_dim": 8,
           "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
           "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
          "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SMALL_VAE = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 16,
             "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
EMBEDDING, PUBLISHED_TOKENS, OUR_TOKENS = 512, 77, 8
PUBLISHED_STEPS, OUR_STEPS, OUR_INTERVAL = 50, 20, (0.2, 0.75)


def flops(run: Callable[[], object]) -> float:
    """GFLOP (a multiplication and an addition are two) of what `run` does."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def forwards(steps: int, guidance: float, interval: tuple[float, float]) -> int:
    """Pictures that the denoiser looks at for one picture."""
    from diffusion_utils.noising import scheduler_config
    from diffusion_utils.sampling import Solver
    from diffusion_utils.schedulers import make_scheduler

    solver = Solver(steps=steps, guidance_scale=guidance, interval=interval)
    scheduler = make_scheduler(scheduler_config("epsilon"), "dpm++", steps)
    return sum(2 if solver.guides(float(timestep) / 1000) else 1 for timestep in scheduler.timesteps)


def count_flops(sides: list[int], rank: int) -> None:
    """Print GFLOP an image of both ways at each side, px; training also of adapters of that rank."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from diffusion_utils.adapters import add_adapters

    with torch.device("meta"):
        published = UNet2DConditionModel(**SD_UNET)
        ours, adapted = (UNet2DConditionModel(**SD_UNET, encoder_hid_dim=OUR_TOKENS * EMBEDDING, encoder_hid_dim_type="text_proj")
                         for _ in range(2))
        add_adapters(adapted, rank, 0)
        vae = AutoencoderKL(**SD_VAE)
    click.echo(f"{'px':>5} {'':<34}{'published':>12}{'ours':>12}{'ratio':>8}   GFLOP an image, SD-1.4")
    for side in sides:
        def learn(unet, tokens: int, width: int, checkpointing: bool, h: int = side // 8) -> float:
            unet.train()
            unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
            with torch.device("meta"):
                return flops(lambda: unet(torch.randn(1, 4, h, h), torch.zeros(1), torch.randn(1, tokens, width)).sample.sum().backward())

        def look(unet, tokens: int, width: int, h: int = side // 8) -> float:
            with torch.no_grad(), torch.device("meta"):
                return flops(lambda: unet(torch.randn(1, 4, h, h), torch.zeros(1), torch.randn(1, tokens, width)))

        with torch.no_grad(), torch.device("meta"):
            encode = flops(lambda px=side: vae.encode(torch.randn(1, 3, px, px)))
            decode = flops(lambda px=side: vae.decode(torch.randn(1, 4, px // 8, px // 8)))
        theirs = look(published, PUBLISHED_TOKENS, 768)
        mine = look(ours, OUR_TOKENS, OUR_TOKENS * EMBEDDING)
        n_theirs, n_ours, n_full = (forwards(*how) for how in ((PUBLISHED_STEPS, 3.0, (0.0, 1.0)), (OUR_STEPS, 3.0, OUR_INTERVAL),
                                                               (OUR_STEPS, 3.0, (0.0, 1.0))))
        interval = f"{OUR_INTERVAL[0]:g}-{OUR_INTERVAL[1]:g}"
        for name, a, b in (
                ("UNet forward", theirs, mine), ("encode, decode", encode, decode),
                ("training", encode + learn(published, PUBLISHED_TOKENS, 768, True),
                 learn(ours, OUR_TOKENS, OUR_TOKENS * EMBEDDING, False)),
                (f"training, ours with --lora-rank {rank}", encode + learn(published, PUBLISHED_TOKENS, 768, True),
                 learn(adapted, OUR_TOKENS, OUR_TOKENS * EMBEDDING, False)),
                (f"sampling, guided at {interval}", n_theirs * theirs + decode, n_ours * mine + decode),
                ("sampling, guided throughout", n_theirs * theirs + decode, n_full * mine + decode)):
            ratio = "" if name.startswith("encode") else f"{a / b:>8.2f}"
            click.echo(f"{side:>5} {name:<34}{a:>12.1f}{b:>12.1f}{ratio}")


def timed(ways: dict[str, Callable[[], object]], n_images: dict[str, int], rounds: int, device: str) -> dict[str, float]:
    """images/s of each way: the median of `rounds` goes, taking turns, after one that is not counted."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: n_images[name] / median(times) for name, times in seconds.items()}


def time_both(device: str, side: int, size: str, batch: int, rounds: int) -> None:
    """Print images/s of training and sampling, both ways; on a GPU in bf16, both."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from diffusion_utils.denoisers import denoise, from_scratch
    from diffusion_utils.latents import posterior_of
    from diffusion_utils.noising import noising_of, scheduler_config
    from diffusion_utils.pipeline import GenePipeline
    from diffusion_utils.prompts import PromptEncoder
    from diffusion_utils.sampling import Solver
    from diffusion_utils.schedulers import make_scheduler

    torch.manual_seed(0)
    vae = AutoencoderKL(**(SD_VAE if size == "sd" else SMALL_VAE)).eval().requires_grad_(False).to(device)
    prompts = PromptEncoder(EMBEDDING, "learned", OUR_TOKENS).to(device)
    if size == "sd":
        unet = UNet2DConditionModel(**SD_UNET, encoder_hid_dim=prompts.width, encoder_hid_dim_type="text_proj").to(device)
    else:
        unet = from_scratch(size, side // 2 ** (len(SMALL_VAE["block_out_channels"]) - 1), vae, prompts, seed=0,
                            prediction="epsilon").denoiser.to(device)
    noising = noising_of(make_scheduler(scheduler_config("epsilon"), "ddim", 1))
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    images, embeddings = torch.rand(batch, 3, side, side, device=device) * 2 - 1, torch.randn(batch, EMBEDDING, device=device)
    cached = posterior_of(vae, images)[0]
    timesteps = torch.arange(batch, device=device) * 1000 // batch
    tokens = prompts(embeddings)

    def half():
        return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda"))

    def learn(x0: torch.Tensor, given: torch.Tensor) -> None:
        noise = torch.randn_like(x0)
        with half():
            predicted = denoise(unet, noising.noisy(x0, noise, timesteps), timesteps, given)
        noising.losses(predicted, x0, noise, timesteps).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def published_step() -> None:
        unet.train().enable_gradient_checkpointing()
        learn(posterior_of(vae, images)[0], tokens[:, :1].expand(-1, PUBLISHED_TOKENS, -1).contiguous())

    def our_step() -> None:
        unet.train().disable_gradient_checkpointing()
        learn(cached, tokens)

    pipeline = GenePipeline(unet, vae, scheduler_config("epsilon"), prompts, side, side, "")
    keys = [(0, number) for number in range(batch)]
    one_by_one = Solver(sampler="ddpm", steps=PUBLISHED_STEPS, guidance_scale=3.0)
    batched = Solver(sampler="dpm++", steps=OUR_STEPS, guidance_scale=3.0, interval=OUR_INTERVAL)

    def draw(n: int, solver: Solver) -> torch.Tensor:
        with half():
            return pipeline.generate(embeddings[:n].cpu(), keys[:n], solver)

    ways = {"training": {"published": published_step, "ours": our_step},
            "sampling": {"published": lambda: draw(1, one_by_one), "ours": lambda: draw(batch, batched)}}
    click.echo(f"\n{size} UNet, {side} px, batch {batch} (the published sampling: 1), {device}, {torch.get_num_threads()} thread(s)")
    for name, both in ways.items():
        found = timed(both, {"published": batch if name == "training" else 1, "ours": batch}, rounds, device)
        click.echo(f"{name:<12} published {found['published']:.2f} images/s, ours {found['ours']:.2f}: "
                   f"{found['ours'] / found['published']:.2f} x")


def count_memory(sides: list[int], rank: int) -> None:
    """Print GB of training SD-1.4 with our prompts, of all weights and of adapters, with and without gradient checkpointing."""
    from diffusers import UNet2DConditionModel

    from benchmarks.stages.diffusion_memory import kept_gb, state_gb, ways

    width = OUR_TOKENS * EMBEDDING
    click.echo(f"\nGB, float32, SD-1.4 with {OUR_TOKENS} learned tokens; kept: for the backward pass of one image, () with gradient "
               "checkpointing")
    click.echo(f"{'':<16}" + "".join(f"{name:>11}" for name in ("weights", "gradients", "optimiser", "average", "sum"))
               + "".join(f"{f'kept {side} px':>20}" for side in sides))
    for name, unet in ways(lambda: UNet2DConditionModel(**SD_UNET, encoder_hid_dim=width, encoder_hid_dim_type="text_proj"), rank).items():
        state = state_gb(unet)
        kept = []
        for side in sides:
            unet.disable_gradient_checkpointing()
            plain = kept_gb(unet, side // 8, OUR_TOKENS, width)
            unet.enable_gradient_checkpointing()
            kept.append(f"{plain:.3f} ({kept_gb(unet, side // 8, OUR_TOKENS, width):.3f})")
        click.echo(f"{name:<16}" + "".join(f"{value:>11.3f}" for value in (*state.values(), sum(state.values())))
                   + "".join(f"{text:>20}" for text in kept))


def compare_quality(model: Path, prompts: Path, real: Path, out: Path, n: int, guidance: float, features: str) -> None:
    """Print the kernel distance to real patches of the published sampling and of ours, from the same weights and prompts."""
    from benchmarks.stages.diffusion_quality import distances_to_real, draw_way

    interval = f"{OUR_INTERVAL[0]:g},{OUR_INTERVAL[1]:g}"
    published, ours = f"ddpm, {PUBLISHED_STEPS} steps, guided throughout", f"dpm++, {OUR_STEPS} steps, guided at {interval}"
    folders = {published: draw_way(out / "published", model, prompts, n, guidance, "ddpm", PUBLISHED_STEPS, "0,1"),
               ours: draw_way(out / "ours", model, prompts, n, guidance, "dpm++", OUR_STEPS, interval)}
    found = distances_to_real(folders, real, model, features)
    click.echo(f"\nkernel distance to real patches x 1000, {n} prompts, guidance {guidance:g}, {features.split('=')[0]} (95 %)")
    for way, (value, low, high) in found.items():
        click.echo(f"{way:<40} {value * 1000:8.3f} ({low * 1000:.3f} to {high * 1000:.3f})")
    click.echo("ours is " + ("not above" if found[ours][0] <= found[published][2] else "above") + " the interval of the published sampling")


@click.command(context_settings={"show_default": True})
@click.option("--parts", default="flops,memory,time", help="flops, memory, time, quality.")
@click.option("--sides", default="64,128,256", help="Of the FLOPs, px.")
@click.option("--device", default="cpu", help="Of the timings: cpu or cuda.")
@click.option("--side", default=64, help="Of the timings, px.")
@click.option("--size", default="small", type=click.Choice(["small", "base", "sd"]), help="Of the timed UNet; sd: SD-1.4 with random "
              "weights, for a GPU.")
@click.option("--batch", default=16, help="Images at a time.")
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="Goes a row.")
@click.option("--lora-rank", default=8, help="Of the FLOPs and memory of adapters.")
@click.option("--model", type=click.Path(path_type=Path), help="quality: run or pipeline folder of train_diffusion.")
@click.option("--prompts", type=click.Path(path_type=Path), help="quality: .npy of prompt embeddings.")
@click.option("--real", type=click.Path(path_type=Path), help="quality: folder of the real patches.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/diffusion_quality", help="quality: where pictures are kept.")
@click.option("--n", default=500, help="quality: prompts, one picture each.")
@click.option("--guidance-scale", default=3.0, help="quality: of both.")
@click.option("--features", default="efficientnet_lite0", help="quality: encoder of the distances.")
def main(parts: str, sides: str, lora_rank: int, model, prompts, real, out, n, guidance_scale, features, **timing):
    """Print GFLOP an image and GB for SD-1.4, images/s of a small UNet, and the quality of sampling, of the published recipe and ours."""
    chosen = parts.split(",")
    if unknown := set(chosen) - {"flops", "memory", "time", "quality"}:
        raise click.BadParameter(f"expected flops, memory, time, quality; found {', '.join(sorted(unknown))}")
    if "quality" in chosen and None in (model, prompts, real):
        raise click.UsageError("--parts quality needs --model, --prompts and --real")
    px = [int(side) for side in sides.split(",")]
    if "flops" in chosen:
        count_flops(px, lora_rank)
    if "memory" in chosen:
        count_memory(px, lora_rank)
    if "time" in chosen:
        time_both(**timing)
    if "quality" in chosen:
        compare_quality(model, prompts, real, out, n, guidance_scale, features)


if __name__ == "__main__":
    main()
