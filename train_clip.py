"""Train CLIP on paired patches and expression; the run folder ends with `clip/`, the weights every later command takes.

    python train_clip.py data.train_gex=S1/gex_filt.h5ad data.train_image_dir=S1/patches \\
                         data.val_gex=S2/gex_filt.h5ad data.val_image_dir=S2/patches

Configurations lie in assets/: clip_config.yaml (the published values, default), clip_small.yaml (real tissue, few spots, on a
CPU), clip_demo.yaml; choose with --config-name clip_small. Several samples: data.train_gex=A.h5ad,B.h5ad. Relative paths mean
the folder the command is started in. SIGTERM and Ctrl-C finish the step and save; a second Ctrl-C ends at once and leaves the
checkpoint before. Continue such a run, or any, with run_dir=runs/00000-clip ckpt_path=last. With run_dir=runs/clip ckpt_path=auto
from the start, the same command begins and goes on. --debug shows tracebacks.

Gene encoders: model.gene_encoder=linear_block (published), bottleneck, hidden, identity, gene_tokens, or pathways with
model.pathways_file=sets.gmt. Batch effects between samples: trainer.contrast=within_sample, trainer.batch_mmd=0.1,
model.gene_sample_scaling=standardise, model.feature_sample_scaling=centre. Frozen features once: image.cache_features=8.

Several devices: trainer.devices=4, or auto for all; trainer.batch_size is that of all together, a multiple of their number, and
every spot is contrasted with the whole of it. Several machines that share a file system: the same command on each, with
trainer.num_nodes=2 trainer.devices=4, started by one of
    srun --nodes 2 --ntasks-per-node 4 python train_clip.py ...
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500 train_clip.py ...
    MASTER_ADDR=FIRST_HOST MASTER_PORT=29500 NODE_RANK=0 python train_clip.py ...       (NODE_RANK=1 on the second)
"""
from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from preprocessing.errors import OptionError, end_progress_bars, is_out_of_memory, one_line_errors
from preprocessing.interrupts import stops_answered

ASSETS = Path(__file__).resolve().parent / "assets"
PATHS = re.compile(r"^(\+{0,2}(?:data\.(?:train|val)_(?:gex|image_dir)|data\.samples|run_dir|out_dir|ckpt_path"
                   r"|(?:data|image)\.cache_dir|model\.(?:image_encoder_weights|pathways_file)))=([^\[\"'].*)$")


def quote_paths(arguments: list[str]) -> list[str]:
    """Hydra reads a comma as a sweep and trips over spaces: a bare path or comma list becomes a quoted string."""
    quoted = []
    for argument in arguments:
        match = PATHS.match(argument)
        if match and match[2] not in ("null", "none"):
            value = match[2].replace("\\", "\\\\").replace('"', '\\"')
            argument = f'{match[1]}="{value}"'
        quoted.append(argument)
    return quoted


def train(loaded, launch_folder: Path) -> Path | None:
    """Train as a Hydra configuration says; returns the run folder, on the first process of several."""
    from training.clip_config import clip_config, from_launch_folder

    config = clip_config(loaded)   # whatever is wrong with it is said before torch is asked for anything
    from training.clip_run import run_clip

    return run_clip(config, lambda path: from_launch_folder(path, launch_folder))


def stop(number: int) -> None:
    """A signal ends the command with one true line and the shell's exit code, before, in and after training."""
    end_progress_bars()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    print(f"stopped by {name} outside training; checkpoints and files that were finished are kept", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def main() -> None:
    """Hydra's door: whatever it raises before our task begins is a usage error in one line; within the task, its own kinds alone."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(f"{__doc__}\n--cfg job shows every key with its value; --hydra-help what Hydra itself understands.")
        return
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    debug = "--debug" in sys.argv
    launch_folder, begun = Path.cwd(), []
    sys.argv = [sys.argv[0], *quote_paths([argument for argument in sys.argv[1:] if argument != "--debug"])]
    os.environ["HYDRA_FULL_ERROR"] = "1"   # hand errors to us instead of printing them

    @hydra.main(version_base="1.3", config_path=str(ASSETS), config_name="clip_config")
    def task(loaded) -> None:
        begun.append(True)
        from training.clip_notices import quiet_lightning

        quiet_lightning()
        with stops_answered(stop), one_line_errors(debug=debug):   # here already: Hydra would add a line of its own
            run_dir = train(loaded, launch_folder)
        if run_dir:
            print(f"wrote {run_dir}/clip (weights), {run_dir}/config.json, {run_dir}/checkpoints", flush=True)

    with one_line_errors(debug=debug):
        try:
            task()
        except YAMLError as error:   # a tag that would build an object, too
            raise OptionError("configuration", "YAML of plain values", " ".join(str(error).split())) from error
        except Exception as error:
            of_hydra = isinstance(error, (HydraException, OmegaConfBaseException))
            if not of_hydra and (begun or isinstance(error, OSError) or is_out_of_memory(error)):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OptionError("command line", "keys of the configuration (--cfg job shows them)", reason) from error


if __name__ == "__main__":
    main()
