"""As command_server.py, for every command of the walk. Not a test file: `test_disturbed_walk.py` starts it."""
import importlib
import sys

import command_server

import calculate_image_quality_metrics
import clip_embeddings
import gen_images
import train_clip
import train_gan
from diffusion_utils import generate_img, train_diffusion
from preprocessing import gene_vocab, simulate_sample

for module in ("diffusers.optimization", "evaluation.cluster_quality", "evaluation.image_quality_page", "hydra", "diffusion_utils.finetune",
               "diffusion_utils.finetune_processes", "diffusion_utils.generation", "torch.utils.tensorboard", "training.clip_embed",
               "training.clip_notices", "training.clip_run", "training.compiler_probe", "training.gan_run", "training.generation",
               "torchmetrics", "torch_fidelity"):
    importlib.import_module(module)


class Hydra:
    """train_clip.py, which reads the process's arguments, called as the others are."""

    @staticmethod
    def main(arguments: list[str]) -> None:
        sys.argv = ["train_clip.py", *arguments]
        train_clip.main()


command_server.COMMANDS |= {
    "simulate": simulate_sample.main, "vocabulary": gene_vocab.main, "clip": Hydra, "embeddings": clip_embeddings.main,
    "gan": train_gan.main, "gen_images": gen_images.main, "diffusion": train_diffusion.main, "generate_img": generate_img.main,
    "metrics": calculate_image_quality_metrics.main}

if __name__ == "__main__":
    command_server.main()
