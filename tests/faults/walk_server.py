"""As command_server.py, for every command. Not a test file: `test_disturbed_walk.py` starts it."""
import importlib

import command_server

import calculate_image_quality_metrics
import clip_embeddings
import evaluate_sections
import gen_images
import interpolate_prompts
import interpretability
import perturb
import train_clip
import train_gan
from diffusion_utils import choose_ema, dump_metadata, generate_img, train_diffusion
from preprocessing import cohort_report, gene_vocab, import_st, simulate_sample

for module in ("diffusers.optimization", "evaluation.cluster_quality", "evaluation.image_quality_page", "hydra", "diffusion_utils.finetune",
               "diffusion_utils.finetune_processes", "diffusion_utils.generation", "torch.utils.tensorboard", "training.clip_embed",
               "training.clip_notices", "training.clip_run", "training.compiler_probe", "training.gan_run", "training.generation",
               "torchmetrics", "torch_fidelity", "accelerate", "diffusers.models.unets.unet_2d_condition", "diffusers.loaders.peft"):
    importlib.import_module(module)


command_server.COMMANDS |= {
    "simulate": simulate_sample.main, "vocabulary": gene_vocab.main, "clip": train_clip.main, "embeddings": clip_embeddings.main,
    "gan": train_gan.main, "gen_images": gen_images.main, "diffusion": train_diffusion.main, "generate_img": generate_img.main,
    "metrics": calculate_image_quality_metrics.main, "perturb": perturb.main, "interpolate": interpolate_prompts.main,
    "interpretability": interpretability.main, "evaluate_sections": evaluate_sections.main, "import_st": import_st.main,
    "cohort_report": cohort_report.main, "choose_ema": choose_ema.main, "dump_metadata": dump_metadata.main}

if __name__ == "__main__":
    command_server.main()
