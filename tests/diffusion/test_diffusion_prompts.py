"""Prompts as tokens, against the published recipe's defects; pairing of patches with embeddings."""
import json

import numpy as np
import pytest
import torch
from diffusion_world import PX, WIDTH, write_world

from diffusion_utils.denoisers import denoise, from_scratch
from diffusion_utils.draws import draw
from diffusion_utils.dump_metadata import dump_metadata
from diffusion_utils.pairs import read_pairs
from diffusion_utils.prompts import PromptEncoder, mean_cosine, read_null_prompt, shuffled
from preprocessing.errors import InputError, OptionError


def unet_of(prompts):
    return from_scratch("small", PX, None, prompts, seed=0, prediction="epsilon").denoiser.eval()


@torch.no_grad()
def test_77_equal_tokens_say_what_one_says():
    prompts = PromptEncoder(WIDTH, "published", cross_width=9)
    unet, x = unet_of(prompts), torch.randn(2, 3, PX, PX)
    one = prompts(torch.randn(2, WIDTH))
    assert one.shape == (2, 1, 9) and (one[:, 0, WIDTH:] == 1).all()
    single = denoise(unet, x, torch.tensor([5, 600]), one)
    repeated = denoise(unet, x, torch.tensor([5, 600]), one.expand(-1, 77, -1))
    other = denoise(unet, x, torch.tensor([5, 600]), one * 2)
    assert (single - repeated).abs().max() < 1e-5 < (single - other).abs().max()


@torch.no_grad()
def test_learned_tokens_are_distinct_learned_maps_of_the_standardised_embedding():
    embeddings = torch.randn(40, WIDTH) + 5
    prompts = PromptEncoder(WIDTH, "learned", 3).fit(embeddings, embeddings.mean(dim=0))
    unet = unet_of(prompts)
    tokens = unet.encoder_hid_proj(prompts(embeddings))                                     # (40, 3, cross width)
    blocks = unet.encoder_hid_proj.weight.view(-1, 3, WIDTH)
    standard = (embeddings - embeddings.mean(dim=0)) * prompts.norm.scale
    for number in range(3):
        assert torch.allclose(tokens[:, number], standard @ blocks[:, number].T + unet.encoder_hid_proj.bias, atol=1e-4)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=0.1)
    assert 0.5 < tokens.std() < 2


def test_prompts_that_padding_makes_alike_stay_apart_as_learned_tokens():
    embeddings = torch.nn.functional.normalize(torch.randn(60, 32) + 1, dim=1)
    published = PromptEncoder(32, "published", cross_width=48)(embeddings).flatten(1)
    learned = PromptEncoder(32, "learned", 4).fit(embeddings, embeddings[0])(embeddings).flatten(1)
    assert mean_cosine(published) > 0.95 and abs(mean_cosine(learned)) < 0.05


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH)], ids=["(D,)", "(1, D)"])
def test_the_null_prompt_comes_from_a_file_of_either_shape(tmp_path, shape):
    np.save(tmp_path / "null.npy", np.arange(WIDTH, dtype=np.float32).reshape(shape))
    null = read_null_prompt(str(tmp_path / "null.npy"), torch.ones(4, WIDTH))
    assert null.tolist() == list(range(WIDTH))


@pytest.mark.parametrize("content, message", [
    (np.zeros((2, WIDTH), np.float32), "one embedding"), (np.zeros(WIDTH + 1, np.float32), "prompt embeddings"),
    (np.full(WIDTH, np.nan, np.float32), "NaN"), (np.array([{}], object), "Python objects")], ids=["two rows", "width", "NaN", "pickle"])
def test_a_null_prompt_that_cannot_be_one_is_refused(tmp_path, content, message):
    np.save(tmp_path / "null.npy", content, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        read_null_prompt(str(tmp_path / "null.npy"), torch.ones(4, WIDTH))


def test_each_sample_drops_its_prompt_on_its_own_at_the_stated_rate():
    dropped = torch.stack([draw(0, step, range(32), (1, 1, 1), p_uncond=0.25, posterior=False).dropped for step in range(60)])
    assert abs(float(dropped.float().mean()) - 0.25) < 0.03
    assert ((dropped.sum(dim=1) > 0) & (dropped.sum(dim=1) < 32)).all()       # never one coin for a batch
    prompts = PromptEncoder(WIDTH, "published", cross_width=9).fit(torch.ones(3, WIDTH), torch.full((WIDTH,), 7.0))
    given = prompts.with_nulls(torch.ones(3, WIDTH), torch.tensor([True, False, True]))
    assert given[:, 0].tolist() == [7, 1, 7]


def test_a_draw_depends_on_seed_step_and_place_alone():
    whole = draw(3, 5, range(6), (2, 4, 4), p_uncond=0.5, posterior=True)
    part = draw(3, 5, range(2, 4), (2, 4, 4), p_uncond=0.5, posterior=True, perturbation=True)
    assert torch.equal(whole.noise[2:4], part.noise) and torch.equal(whole.posterior[2:4], part.posterior)
    assert torch.equal(whole.orientation[2:4], part.orientation) and not torch.equal(part.noise, part.perturbation)
    assert not torch.equal(whole.noise, draw(3, 6, range(6), (2, 4, 4), p_uncond=0.5, posterior=True).noise)


def test_published_prompts_wider_than_cross_attention_are_refused():
    with pytest.raises(OptionError, match="at most 4 wide"):
        PromptEncoder(5, "published", cross_width=4)


# ---- pairing --------------------------------------------------------------------------------------------------------

def read(world):
    return read_pairs(str(world / "patches"), str(world / "emb.npy"))


def tells_its_colour(pairs):
    colours = np.stack([pairs.patches.read_image(row).mean(axis=(0, 1)) for row in range(len(pairs))])
    return np.abs(colours / 127.5 - 1 - pairs.embeddings[:, :3].numpy()).max() < 0.2


def test_patches_pair_with_their_rows_however_metadata_is_sorted(tmp_path):
    world = write_world(tmp_path)
    lines = (world / "patches" / "metadata.jsonl").read_text().splitlines()
    (world / "patches" / "metadata.jsonl").write_text("\n".join(lines[::-1]))
    (world / "patches" / "stray.png").write_bytes(b"not listed")
    assert tells_its_colour(read(world))


def test_a_folder_with_a_comma_in_its_name_is_one_folder_and_a_list_without_any_is_refused(tmp_path):
    world = write_world(tmp_path / "HER2, left")
    assert tells_its_colour(read(world))
    for images, embeddings, message in (("", "", "--train-data-dir: expected at least one"), (",", "a.npy", "--train-data-dir"),
                                        ("a,b", "a.npy", "--dataset-embs: expected one .npy for each of the 2")):
        with pytest.raises(OptionError, match=message):
            read_pairs(images, embeddings)


def test_embeddings_of_a_re_sorted_expression_file_pair_by_its_barcodes(tmp_path):
    import anndata as ad

    from preprocessing.done_manifests import strings_sha256
    world, order = write_world(tmp_path), np.random.default_rng(1).permutation(12)
    barcodes = [f"B{row}-1" for row in order]
    adata = ad.AnnData(np.ones((12, 1), np.float32))
    adata.obs_names = barcodes
    adata.write_h5ad(tmp_path / "gex.h5ad")
    np.save(world / "emb.npy", np.load(world / "emb.npy")[order])
    record = {"barcode_sha256": strings_sha256(barcodes), "files": ["emb.npy"], "gex": str(tmp_path / "gex.h5ad")}
    (world / "embeddings.json").write_text(json.dumps(record))
    assert tells_its_colour(read(world))
    (world / "embeddings.json").write_text(json.dumps({**record, "gex": None}))
    with pytest.raises(InputError, match="barcode_sha256"):
        read(world)


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[:-1], "one a patch"), (lambda rows: rows * np.nan, "NaN"), (lambda rows: rows[None], "numbers")],
    ids=["one row less", "NaN", "three axes"])
def test_embeddings_that_do_not_fit_are_refused(tmp_path, change, message):
    world = write_world(tmp_path)
    np.save(world / "emb.npy", change(np.load(world / "emb.npy")))
    with pytest.raises(InputError, match=message):
        read(world)


def test_a_foreign_folder_gets_its_metadata_from_the_numbers_in_its_names(tmp_path):
    world = write_world(tmp_path, record=False)
    for path in [world / "patches" / "metadata.jsonl", world / "patches" / "stain.json"]:
        path.unlink()
    for path in sorted((world / "patches").glob("*.png")):
        path.rename(path.with_name(f"img{int(path.stem.split('_')[1])}.png"))
    with pytest.warns(UserWarning, match="natural order"):
        dump_metadata(world / "patches")
    assert tells_its_colour(read(world))


def test_metadata_that_would_be_written_again_stays_and_any_other_is_refused(tmp_path):
    world = write_world(tmp_path, record=False)
    metadata = world / "patches" / "metadata.jsonl"
    metadata.unlink()
    written = dump_metadata(world / "patches").read_text()
    assert dump_metadata(world / "patches").read_text() == written
    metadata.write_text(other := written.replace('"gex_emb": 1}', '"gex_emb": 2}'))
    with pytest.raises(InputError, match="expected none, or what would be written"):
        dump_metadata(world / "patches")
    assert metadata.read_text() == other != written


def test_shuffled_prompts_are_the_same_prompts_at_other_patches():
    rows = torch.arange(50.0)[:, None]
    other = shuffled(rows, 0)
    assert sorted(other.flatten().tolist()) == rows.flatten().tolist() and (other != rows).float().mean() > 0.8
    assert torch.equal(other, shuffled(rows, 0)) and not torch.equal(other, shuffled(rows, 1))
