"""A pipeline folder: pictures that depend on prompt and seed alone, guidance that costs what it must, stock diffusers' picture."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusion_world import PX, WIDTH, config, run, tiny_vae, write_world
from PIL import Image

from diffusion_utils import generate_img
from diffusion_utils.denoisers import from_scratch
from diffusion_utils.finetune import open_run
from diffusion_utils.noising import scheduler_config
from diffusion_utils.pipeline import GenePipeline, load_pipeline, write_pipeline
from diffusion_utils.prompts import PromptEncoder
from diffusion_utils.sampling import Solver
from evaluation.features import list_images
from evaluation.sections import read_generated
from preprocessing.errors import InputError, OptionError, WeightsError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("sampling"))
    run(folder, folder / "run")
    np.save(folder / "prompts.npy", np.load(folder / "emb.npy")[:5])
    return folder


@pytest.fixture(scope="module")
def latent_folder(world):
    """A pipeline with an autoencoder."""
    tiny_vae().save_pretrained(world / "vae")
    run(world, world / "latent", pretrained_vae_path=str(world / "vae"), prediction_type="epsilon")
    return world / "latent" / "pipeline"


def call(world, out, **options):
    arguments = {"model_checkpoint": world / "run", "prompt_file": world / "prompts.npy", "gen_img_path": out, "steps": 3, "device": "cpu",
                 **options}
    text = [part for name, value in arguments.items() if value is not None
            for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
    return CliRunner().invoke(generate_img.main, [*text, "--no-progress"])


def made(world, out, **options):
    result = call(world, out, **options)
    assert result.exit_code == 0, result.output
    return {path.relative_to(out).as_posix(): np.asarray(Image.open(path)).astype(int)
            for path in sorted(out.rglob("prompt*.png"))}


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_the_batch_size_does_not_change_a_picture(world, tmp_path, sampler):
    one = made(world, tmp_path / "one", num_imgs=2, batch_size=1, sampler=sampler)
    eight = made(world, tmp_path / "eight", num_imgs=2, batch_size=8, sampler=sampler)
    assert list(one) == [f"prompt{row:05d}_seed{seed:04d}.png" for row in range(5) for seed in range(2)] == list(eight)
    assert max(np.abs(one[name] - eight[name]).max() for name in one) <= 1
    assert all((one["prompt00000_seed0000.png"] != one[name]).any() for name in list(one)[1:])


class Counted(torch.nn.Module):
    """A denoiser that counts the pictures it looks at."""

    def __init__(self, denoiser):
        super().__init__()
        self.module, self.seen = denoiser, 0

    @property
    def config(self):
        return self.module.config

    def forward(self, x, *arguments, **options):
        self.seen += len(x)
        return self.module(x, *arguments, **options)


@pytest.mark.parametrize("solver, forwards", [
    (Solver(steps=10, guidance_scale=1.0), 10), (Solver(steps=10, guidance_scale=3.0), 20),
    (Solver(steps=10, guidance_scale=3.0, interval=(0.25, 0.75)), 15)], ids=["scale 1", "scale 3", "interval"])
def test_guidance_costs_a_second_forward_only_where_it_acts(world, solver, forwards):
    pipeline = load_pipeline(world / "run")
    counted = Counted(pipeline.denoiser)
    GenePipeline(counted, None, pipeline.scheduler, pipeline.prompts, PX, PX, "").generate(torch.zeros(1, WIDTH), [(0, 0)], solver)
    assert counted.seen == forwards


def test_scale_1_is_the_prompt_alone_scale_0_the_null_prompt_alone(world):
    pipeline, prompt = load_pipeline(world / "run"), torch.randn(1, WIDTH)
    def drawn(embedding, scale):
        return pipeline.latents(embedding, [(0, 0)], Solver(steps=3, guidance_scale=scale))
    assert torch.allclose(drawn(prompt, 0.0), drawn(pipeline.prompts.null[None], 1.0), atol=1e-4)
    assert not torch.allclose(drawn(prompt, 1.0), drawn(prompt, 4.0), atol=1e-4)


def test_same_seed_leaves_only_the_genes_to_differ(world, tmp_path):
    same = made(world, tmp_path / "same", num_imgs=1, same_seed=True)
    rows = np.load(world / "prompts.npy")
    np.save(tmp_path / "equal.npy", np.stack([rows[0], rows[0]]))
    equal = made(world, tmp_path / "equal", num_imgs=1, same_seed=True, prompt_file=tmp_path / "equal.npy")
    own = made(world, tmp_path / "own", num_imgs=1, prompt_file=tmp_path / "equal.npy")
    first, second = equal.values()
    assert np.abs(first - second).max() <= 1 and np.abs(first - same["prompt00000_seed0000.png"]).max() <= 1
    assert (own["prompt00000_seed0000.png"] != own["prompt00001_seed0000.png"]).any()


def test_the_list_the_sheet_and_the_control_are_written(world, tmp_path):
    pictures = made(world, tmp_path, seeds="3,5", null_control=True, output_px=16)
    assert all(picture.shape == (16, 16, 3) for picture in pictures.values())
    rows = list(csv.DictReader(open(tmp_path / "samples.csv")))
    nulls = list(csv.DictReader(open(tmp_path / "null" / "samples.csv")))
    assert sorted(row["file"] for row in rows) + sorted(f"null/{row['file']}" for row in nulls) == \
        sorted(name for name in pictures if "/" not in name) + sorted(name for name in pictures if "/" in name)
    assert {row["seed"] for row in rows} == {"3", "5"} and {row["prompt"] for row in nulls} == {"null"} and len(nulls) == len(rows) == 10
    assert len(list_images(tmp_path).paths) == len(list_images(tmp_path / "null").paths) == 10      # what metrics score
    assert Image.open(tmp_path / "grid.png").size[0] > 2 * 16
    some = made(world, tmp_path / "some", num_imgs=1, n_prompts=2, output_px=16)
    assert list(some) == ["prompt00000_seed0000.png", "prompt00004_seed0000.png"]


def test_the_list_names_the_spot_of_a_prompt_where_its_embeddings_record_it(world, tmp_path):
    import anndata as ad

    from preprocessing.done_manifests import strings_sha256
    barcodes = ["AC-1", "GT-1", "TT-1"]
    adata = ad.AnnData(np.ones((3, 1), np.float32))
    adata.obs_names = barcodes
    adata.write_h5ad(tmp_path / "gex.h5ad")
    np.save(tmp_path / "emb.npy", np.ones((3, WIDTH), np.float32))
    (tmp_path / "embeddings.json").write_text(json.dumps({"barcode_sha256": strings_sha256(barcodes), "files": ["emb.npy"],
                                                          "gex": str(tmp_path / "gex.h5ad")}))
    made(world, tmp_path / "out", prompt_file=tmp_path / "emb.npy", seeds="3", n_prompts=2, null_control=True)
    rows = list(csv.DictReader(open(tmp_path / "out" / "samples.csv")))
    assert [(row["prompt"], row["barcode"]) for row in rows] == [("0", "AC-1"), ("2", "TT-1")]
    generated = read_generated(tmp_path / "out", "S", barcodes)                # evaluation reads it, without the controls
    assert generated.rows.tolist() == [0, 2] and generated.images.shape == (2, 1, PX, PX, 3)
    np.save(tmp_path / "emb.npy", np.ones((4, WIDTH), np.float32))
    refused = call(world, tmp_path / "other", prompt_file=tmp_path / "emb.npy")
    assert refused.exit_code == 3 and "expected 3, as embeddings.json says; found 4" in refused.output


def test_latents_decode_to_the_pictures(world, latent_folder, tmp_path):
    result = call(world, tmp_path / "latents", model_checkpoint=latent_folder, output_type="latent", num_imgs=1)
    assert result.exit_code == 0, result.output
    latents = np.load(tmp_path / "latents" / "latents.npy")
    pictures = made(world, tmp_path / "pictures", model_checkpoint=latent_folder, num_imgs=1)
    decoded = load_pipeline(latent_folder).decode(torch.from_numpy(latents)).permute(0, 2, 3, 1).numpy().astype(int)
    assert latents.shape == (5, 4, PX // 2, PX // 2)
    assert max(np.abs(ours - theirs).max() for ours, theirs in zip(decoded, pictures.values(), strict=True)) <= 1


def test_stock_diffusers_loads_the_folder_and_draws_the_same_picture(latent_folder):
    import diffusers

    ours, stock = load_pipeline(latent_folder), diffusers.StableDiffusionPipeline.from_pretrained(latent_folder, text_encoder=None,
                                                                                                  tokenizer=None)
    stock.set_progress_bar_config(disable=True)
    prompt, noise = torch.randn(2, WIDTH), torch.randn(2, *ours.noise_shape())
    from diffusion_utils.sampling import sample
    from diffusion_utils.schedulers import make_scheduler
    tokens, nulls = ours.prompts(prompt), ours.prompts.null_tokens()
    x0 = sample(ours.denoiser, make_scheduler(ours.scheduler, "ddim", 4), tokens, nulls, noise, Solver(sampler="ddim", steps=4))
    theirs = stock(prompt_embeds=tokens, negative_prompt_embeds=nulls.expand(2, -1, -1), num_inference_steps=4, guidance_scale=3.0,
                   latents=noise, output_type="np", height=PX, width=PX).images
    mine = ours.decode(x0).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(mine - theirs * 255).max() <= 1.01 and mine.std() > 1


def test_a_pixel_space_folder_brings_its_own_pipeline_class(world):
    import diffusers

    folder, ours = world / "run" / "pipeline", load_pipeline(world / "run")
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder / "pipeline.py"), trust_remote_code=True)
    stock.set_progress_bar_config(disable=True)
    prompt, noise = torch.randn(2, WIDTH), torch.randn(2, 3, PX, PX)
    from diffusion_utils.sampling import sample
    from diffusion_utils.schedulers import make_scheduler
    tokens, nulls = ours.prompts(prompt), ours.prompts.null_tokens()
    x0 = sample(ours.denoiser, make_scheduler(ours.scheduler, "ddim", 4), tokens, nulls, noise, Solver(sampler="ddim", steps=4))
    theirs = stock(prompt_embeds=tokens, negative_prompt_embeds=nulls, num_inference_steps=4, latents=noise, output_type="np").images
    assert type(stock).__name__ == "GenePixelPipeline"
    assert np.abs(ours.decode(x0).permute(0, 2, 3, 1).numpy().astype(int) - theirs * 255).max() <= 1.01


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_a_transformer_base_learns_and_draws(world, tmp_path, name):
    import diffusers

    layout = {"PixArtTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8, "cross_attention_dim": 16,
                                           "caption_channels": 9, "norm_num_groups": 4},
              "SD3Transformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 4, "joint_attention_dim": 9,
                                        "caption_projection_dim": 16, "pooled_projection_dim": 4, "pos_embed_max_size": 8}}[name]
    torch.manual_seed(0)
    transformer = getattr(diffusers, name)(in_channels=4, num_layers=1, sample_size=4, patch_size=2, **layout)
    if name.startswith("SD3"):
        with torch.no_grad():                                    # its layers start at zero, where prompts cannot be told apart
            for parameter in transformer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    prediction = "flow" if name.startswith("SD3") else "epsilon"
    write_pipeline(tmp_path / "base", transformer, tiny_vae(), scheduler_config(prediction), PromptEncoder(9, "published", cross_width=9),
                   {"resolution": PX})
    trained = run(world, tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "base"))
    pipeline = load_pipeline(tmp_path / "run")
    images = pipeline.generate(torch.randn(2, WIDTH) * 3, [(0, 0), (0, 0)], Solver(steps=3))
    assert trained.standing.bad_steps == 0 and images.shape == (2, 3, PX, PX) and (images[0] != images[1]).any()
    published = open_run(config(world, tmp_path / "published", pretrained_model_name_or_path=str(tmp_path / "base"),
                                prompt_tokens="published"))
    assert published.prompts.width == 9


@pytest.mark.parametrize("prediction, sampler", [("flow", "dpm++"), ("flow", "unipc"), ("flow", "euler"), ("v_prediction", "unipc"),
                                                 ("v_prediction", "euler"), ("v_prediction", "ddpm"), ("epsilon", "ddim"),
                                                 ("v_prediction", "dpm++")])
def test_every_solver_finds_the_one_picture_there_is(prediction, sampler):
    from diffusion_utils.noising import noising_of
    from diffusion_utils.sampling import sample
    from diffusion_utils.schedulers import make_scheduler

    prompts = PromptEncoder(WIDTH, "published", cross_width=9)
    base = from_scratch("small", PX, None, prompts, seed=0, prediction=prediction)
    noising, picture = noising_of(make_scheduler(base.scheduler, "dpm++", 1)), torch.rand(1, 3, PX, PX) * 2 - 1

    class Knows(torch.nn.Module):
        """Predicts what leads to `picture`."""
        config = base.denoiser.config

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, timesteps, tokens, return_dict):
            timesteps = timesteps if prediction == "flow" else timesteps.round().long()
            a, b = noising._weights(timesteps)
            return (noising.target(picture, (x - a * picture) / b, timesteps),)
    found = sample(Knows(), make_scheduler(base.scheduler, sampler, 20), torch.zeros(1, 1, 9), torch.zeros(1, 1, 9),
                   torch.randn(1, 3, PX, PX), Solver(sampler=sampler, steps=20, guidance_scale=1.0), [torch.Generator().manual_seed(0)])
    assert (found - picture).abs().max() < 0.1


@pytest.mark.parametrize("options, code, message", [
    ({"prompt_file": "wide.npy"}, 3, "prompt embeddings"), ({"prompt_file": "nan.npy"}, 3, "NaN"),
    ({"prompt_file": "gone.npy"}, 3, "nothing"),
    ({"guidance_interval": "0.8,0.2"}, 2, "lo <= hi"), ({"guidance_scale": "nan"}, 2, "--guidance-scale"), ({"seeds": "x"}, 2, "--seeds"),
    ({"resolution": 9}, 2, "--resolution"), ({"model_checkpoint": "nowhere"}, 3, "a pipeline folder"), ({"num_imgs": 0}, 2, "--num-imgs")])
def test_a_call_that_cannot_be_is_refused_in_one_line(world, tmp_path, options, code, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.zeros((2, WIDTH + 1), np.float32))
    np.save("nan.npy", np.full((2, WIDTH), np.nan, np.float32))
    result = call(world, tmp_path / "out", **options)
    assert result.exit_code == code and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_damaged_pipeline_is_refused(world, tmp_path):
    shutil.copytree(world / "run" / "pipeline", tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        load_pipeline(tmp_path / "pipeline")
    assert call(world, tmp_path / "out", model_checkpoint=tmp_path / "pipeline").exit_code == 5


def test_a_sampler_that_cannot_solve_flow_matching_is_refused(world, tmp_path):
    from diffusion_utils.schedulers import make_scheduler
    with pytest.raises(OptionError, match="flow matching"):
        make_scheduler(scheduler_config("flow"), "ddim", 5)
    with pytest.raises(InputError, match="prediction_type"):
        make_scheduler({**scheduler_config("epsilon"), "prediction_type": "sample"}, "ddim", 5)
