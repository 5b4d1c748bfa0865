"""Generate patches from a fine-tuned pipeline for prompt embeddings."""
from __future__ import annotations

from pathlib import Path

import click

from diffusion_utils.options import option, switch
from preprocessing.errors import Command


@click.command(cls=Command)
@option("model-checkpoint", type=click.Path(path_type=Path), required=True, help="Pipeline folder, or the run folder it lies in.")
@option("prompt-file", type=click.Path(path_type=Path), required=True, help=".npy of prompt embeddings (N, D), as in training.")
@option("gen-img-path", type=click.Path(path_type=Path), required=True, help="Folder for the patches, samples.csv and grid.png.")
@option("num-imgs", type=click.IntRange(max=10**6), default=5, help="Patches a prompt: seeds 0, 1, ...")
@option("seeds", help="Instead: these seeds, as 0,1,4-6.")
@option("n-prompts", type=int, help="Draw for so many of the prompts, evenly chosen. Default: all.")
@switch("classifier-free-guidance", True, help="Weigh the prompt against the null prompt.")
@option("guidance-scale", default=3.0, help="Weight of the prompt over the null prompt; 1 is off, and half the work.")
@option("guidance-interval", default="0,1", help="Where guidance acts: lo,hi of the noise schedule, 0 clean, 1 noise. 0.2,0.75 saves work.")
@option("uncond-embedding", type=click.Path(path_type=Path), help="Another null prompt: .npy of shape (D,) or (1, D).")
@option("same-seed", is_flag=True, help="The same noise for all prompts of a seed, so that only the genes differ.")
@option("output-type", type=click.Choice(["pil", "latent"]), default="pil", help="latent: one latents.npy instead of PNGs.")
@option("batch-size", type=click.IntRange(max=2**16), default=16, help="Patches at a time; does not change them.")
@option("steps", type=click.IntRange(max=10_000), default=20, help="Steps from noise to patch.")
@option("sampler", type=click.Choice(["dpm++", "unipc", "ddim", "ddpm", "euler"]), default="dpm++", help="Solver.")
@option("resolution", type=click.IntRange(max=4096), help="Side at which patches are drawn, px. Default: as learned.")
@option("output-px", type=click.IntRange(max=4096),
        help="Side of the files, px. Default: as drawn, or the side of the training patches if that is smaller.")
@option("dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", help="Of the denoiser.")
@option("compile", is_flag=True, help="Compile the denoiser's repeated blocks.")
@option("null-control", is_flag=True, help="Also null/ with a list of its own: the same noise without genes.")
@option("device", default="auto", help="auto, cpu, cuda, cuda:1.")
@switch("progress", True, help="Show a progress bar.")
def main(**options):
    """Generate patches for prompt embeddings.

    \b
    python -m diffusion_utils.generate_img --model-checkpoint runs/diffusion --prompt-file runs/C4/embeddings/gene_clip_emb.npy \\
        --gen-img-path runs/C4/generated --num-imgs 5 --guidance-interval 0.2,0.75
    """
    from diffusion_utils.generation import GenerateConfig, generate_images

    files = generate_images(GenerateConfig(**options))
    click.echo(f"wrote {len(files):,} files to {options['gen_img_path']}")


if __name__ == "__main__":
    main()
