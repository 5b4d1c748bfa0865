"""Change genes and look: generator + expression + changed genes -> patches before and after, effects with intervals, a page."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from preprocessing.errors import Command
from training.sampling_options import is_pipeline, refuse_given, sampling_options, solver_options

GAN_ALONE = ("truncation", "noise_mode", "translate", "rotate")
PIPELINE_ALONE = ("steps", "sampler", "guidance_scale")


@click.command(cls=Command)
@click.option("--gex", type=click.Path(path_type=Path), required=True, help="Expression of a whole sample, .h5ad of raw counts.")
@click.option("--genes", required=True, help="Changes of normalised expression (log1p): Up:+2,Down:0 adds 2 to Up and sets Down to 0; or a "
              "file of such lines.")
@click.option("--gene-sets", type=click.Path(path_type=Path), help="GMT file: --genes may name its sets, whose genes then all change.")
@click.option("--spots", help="Barcodes or row numbers, separated by commas.")
@click.option("--cluster", help="Or: spots of this cluster.")
@click.option("--cluster-labs", default="cluster", help="Where clusters are: .npy, CSV (last column; by barcode if "
              "another column has them), or an obs column.")
@click.option("--n-spots", default=8, help="At most so many spots, drawn with the first seed; --spots are all taken.")
@click.option("--controls", type=click.IntRange(max=10_000), default=20,
              help="Random sets of as many genes of like expression to compare with; 0 is none.")
@click.option("--patch-um", type=click.FloatRange(max=10_000), help="Side of a patch, µm.  [default: as the .h5ad says, else 55]")
@solver_options
@partial(sampling_options, seeds="0-7", encoded=False)
def main(**options):
    """Change genes of spots and see what the generator makes of it: nuclei, their area, haematoxylin and eosin.

    \b
    python perturb.py --network runs/gan/00000-C2-C3@64-small-gpus1-b16 --gex runs/C4/gex_filt.h5ad --genes ERBB2:+2,KRT17:0 \\
        --cluster 3 --seeds 0-15 --outdir runs/perturbed
    python perturb.py --network runs/diffusion --clip runs/clip/clip --gex runs/C4/gex_filt.h5ad --genes ERBB2:+2 --outdir runs/perturbed

    The first draws from a GAN snapshot, the second from a diffusion pipeline, which knows embeddings alone: --clip names the CLIP
    weights that made those of its training. Patches before and after share their noise. Intervals are over seeds. An effect counts if
    random sets of as many genes of like expression rarely do as much.
    """
    from training.perturbation import PerturbConfig, perturb

    solving = {name: value for name in PIPELINE_ALONE if (value := options.pop(name)) is not None}
    if is_pipeline(options["network"]):
        from diffusion_utils.perturbation import pipeline_source
        from diffusion_utils.sampling import Solver

        refuse_given(GAN_ALONE, "a GAN snapshot as --network", "a diffusion pipeline")
        effects, files = perturb(PerturbConfig(**options), partial(pipeline_source, solver=Solver(**solving)))
    else:
        refuse_given(solving, "a diffusion pipeline as --network", "a GAN snapshot")
        effects, files = perturb(PerturbConfig(**options))
    for effect in effects:
        low, high = effect.interval
        interval = f"({low:.3g} to {high:.3g})" if effect.has_interval else "(no interval: it takes two seeds or more)"
        beside = "" if not len(effect.controls) else " (random sets {:.3g} to {:.3g})".format(*effect.control_range)
        click.echo(f"{effect.name}: {effect.change:+.3g} {interval} from {effect.before:.3g}{beside}"
                   + (" *" if effect.stands_out else ""))
    click.echo(f"wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
