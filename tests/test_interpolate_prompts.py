"""interpolate_prompts.py from two prompts to a strip of patches, as a user calls it."""
import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_world import GENES, PX, WIDTH, N, apart, call, make_world, pictures

import gen_images
import interpolate_prompts
from training.interpolation import slerp


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("walks"))


def walk(world, name, first=0, second=5, **options):
    outdir = world / name
    shutil.rmtree(outdir, ignore_errors=True)
    prompts = {f"prompt{i}": which if ":" in str(which) else f"{world / 'gex.h5ad'}:{which}" for i, which in enumerate((first, second), 1)}
    result = call(interpolate_prompts, **{"network": world / "snapshot", "outdir": outdir, "n_steps": 5, **prompts, **options})
    return result, outdir


def walked(world, name, *prompts, **options):
    result, outdir = walk(world, name, *prompts, **options)
    assert result.exit_code == 0, result.output
    return pictures(outdir, "seed*.png")


def test_both_ends_are_the_patches_of_the_prompts_and_the_steps_between_are_others(world):
    made = walked(world, "ends", seeds="0,3")
    assert list(made) == [f"seed{seed:04d}_step{step:02d}.png" for seed in (0, 3) for step in range(5)]
    result = call(gen_images, network=world / "snapshot", gex=world / "gex.h5ad", outdir=world / "prompts", seeds="0,3", same_seed=True)
    assert result.exit_code == 0, result.output
    asked = pictures(world / "prompts")
    for seed in (0, 3):
        for step, prompt in ((0, 0), (4, 5)):
            assert np.abs(made[f"seed{seed:04d}_step{step:02d}.png"] - asked[f"prompt{prompt:05d}_seed{seed:04d}.png"]).max() <= 1
        steps = [made[f"seed{seed:04d}_step{step:02d}.png"] for step in range(5)]
        assert all((a != b).any() for a, b in zip(steps, steps[1:], strict=False))


def test_samples_csv_names_every_patch_and_the_strip_shows_a_row_a_seed(world):
    made = walked(world, "listed", seeds="0-1", n_steps=3)
    rows = list(csv.DictReader(open(world / "listed" / "samples.csv")))
    assert [row["file"] for row in rows] == list(made)
    assert [(row["seed"], row["step"], row["share"]) for row in rows] == [(seed, step, share) for seed in "01" for step, share in
                                                                         (("0", "0"), ("1", "0.5"), ("2", "1"))]
    assert rows[0]["prompt1"].endswith("gex.h5ad:0") and rows[0]["prompt2"].endswith("gex.h5ad:5") and len(rows[0]["weights_sha256"]) == 64
    strip = np.asarray(Image.open(world / "listed" / "strip.png")).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(strip, (PX, PX, 3))[:, :, 0]
    places = [tuple(np.argwhere((windows == picture).all(axis=(2, 3, 4)))[0]) for picture in made.values()]
    assert places == sorted(places) and [y for y, _ in places[:3]] == [places[0][0]] * 3 and places[3][0] > places[0][0]


def test_equal_prompts_give_one_patch_a_seed_as_its_z_and_noise_stay(world):
    made = list(walked(world, "equal", 2, 2).values())
    assert max(np.abs(picture - made[0]).max() for picture in made) <= 1
    assert (list(walked(world, "equal_other_seed", 2, 2, seeds="1").values())[0] != made[0]).any()


def test_opposite_prompts_are_joined_by_a_way_that_never_changes(world):
    row = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    np.save(world / "opposite.npy", np.stack([row, -row]))
    prompts = f"{world / 'opposite.npy'}:0", f"{world / 'opposite.npy'}:1"
    first, again = (walked(world, name, *prompts, encoded=True) for name in ("opposite", "opposite_again"))
    assert apart(first, again) == 0 and all(np.isfinite(picture).all() for picture in first.values())
    steps = list(first.values())
    assert all((a != b).any() for a, b in zip(steps, steps[1:], strict=False))


def test_a_prompt_is_named_by_barcode_or_row_of_an_h5ad_or_by_row_of_an_npy(world):
    by_row = walked(world, "by_row")
    assert apart(by_row, walked(world, "by_barcode", "AAAC0000-1", "S__AAAC0005-1")) == 0
    np.save(world / "rows.npy", np.random.default_rng(2).random((N, GENES)).astype(np.float32))
    from_npy = walked(world, "npy", f"{world / 'rows.npy'}:0", f"{world / 'rows.npy'}:5")
    assert apart(by_row, from_npy) > 0
    mixed = walked(world, "mixed", 0, f"{world / 'rows.npy'}:5")
    assert (mixed["seed0000_step00.png"] == by_row["seed0000_step00.png"]).all()
    assert np.abs(mixed["seed0000_step04.png"] - from_npy["seed0000_step04.png"]).max() <= 1


@pytest.mark.parametrize("options", [{"truncation": 0.2}, {"noise_mode": "const"}, {"noise_mode": "none"}, {"translate": "0.25,0"},
                                     {"rotate": 90}, {"network": "other"}], ids=str)
def test_every_option_of_sampling_changes_the_walk(world, options):
    plain = walked(world, "plain")
    options = {**options, "network": world / options.get("network", "snapshot")}
    assert all((picture != plain[name]).any() for name, picture in walked(world, "changed", **options).items())


def test_batches_and_threads_do_not_change_the_walk(world):
    plain = walked(world, "plain", seeds="0-1")
    assert apart(plain, walked(world, "batches", seeds="0-1", batch_sz=3, workers=3)) <= 1


def test_a_moved_gene_encoder_is_named_with_clip(world, tmp_path):
    shutil.copytree(world / "snapshot", tmp_path / "a" / "snapshot")
    assert walk(world, "moved", network=tmp_path / "a" / "snapshot")[0].exit_code == 3
    assert apart(walked(world, "told", network=tmp_path / "a" / "snapshot", clip=world / "clip"), walked(world, "plain")) == 0


@pytest.mark.parametrize(("prompts", "options", "code", "says"), [
    ((0, 5), {"n_steps": 1}, 2, "--n-steps: expected at least 2"),
    ((0, 5), {"seeds": "x"}, 2, "--seeds"), ((0, 5), {"batch_sz": 0}, 2, "--batch-sz"), ((0, 5), {"workers": 0}, 2, "--workers"),
    ((0, 5), {"device": "foo"}, 2, "--device"),
    ((":5", 5), {}, 2, "--prompt1: expected FILE.npy:ROW"), ((0, "gex.h5ad:"), {}, 2, "--prompt2: expected FILE.npy:ROW"),
    ((0, N), {}, 3, "a barcode of it, or 0 to 15; found 16"), (("AAAC9999-1", 0), {}, 3, "found AAAC9999-1"), ((-1, 0), {}, 3, "found -1"),
    (("nowhere.h5ad:0", 0), {}, 3, "nowhere.h5ad"), ((0, 5), {"encoded": True}, 2, "--encoded: expected an .npy of embeddings"),
], ids=str)
def test_what_is_no_prompt_is_refused_in_one_line(world, prompts, options, code, says):
    result, outdir = walk(world, "refused", *prompts, **options)
    assert result.exit_code == code and says in result.output and "Traceback" not in result.output and not outdir.exists()


@pytest.mark.parametrize(("rows", "says"), [
    (np.ones((2, WIDTH + 1)), f"(prompts, {WIDTH})"), (np.full((2, WIDTH), np.nan), "NaN or infinite"),
    (np.array([[1.0] * WIDTH, [0.0] * WIDTH]), "embedding of 1: expected a direction"),
], ids=["width", "nan", "zeros"])
def test_embeddings_that_point_nowhere_are_refused(world, rows, says):
    np.save(world / "bad.npy", rows)
    result, outdir = walk(world, "bad", f"{world / 'bad.npy'}:0", f"{world / 'bad.npy'}:1", encoded=True)
    assert result.exit_code == 3 and says in result.output and not outdir.exists()


def unit(*numbers):
    return torch.tensor(numbers) / torch.tensor(numbers).norm()


def test_slerp_goes_equal_angles_on_the_sphere():
    first, second = unit(1.0, 2.0, 0.5), unit(-1.0, 1.0, 3.0)
    steps = slerp(first, second, 7)
    assert torch.equal(steps[0], first) and torch.equal(steps[-1], second)
    assert torch.allclose(steps.norm(dim=1), torch.ones(7), atol=1e-6)
    angles = torch.acos((steps[:-1] * steps[1:]).sum(dim=1))
    assert torch.allclose(angles, torch.acos(first @ second) / 6 * torch.ones(6), atol=1e-3)
    assert torch.allclose(steps.flip(0), slerp(second, first, 7), atol=1e-6)
    assert int(torch.linalg.matrix_rank(steps, atol=1e-5)) == 2


def test_slerp_of_equal_and_of_opposite_prompts_stays_on_the_sphere():
    first = unit(0.3, -2.0, 0.1, 1.0)
    assert torch.allclose(slerp(first, first, 4), first.expand(4, 4), atol=1e-7)
    steps = slerp(first, -first, 5)
    assert torch.allclose(steps.norm(dim=1), torch.ones(5), atol=1e-6) and abs(float(steps[2] @ first)) < 1e-6
    assert torch.equal(steps[-1], -first) and torch.equal(steps, slerp(first, -first, 5))


def test_slerp_of_other_lengths_changes_the_length_in_equal_steps():
    steps = slerp(2 * unit(1.0, 0.0), 6 * unit(0.0, 1.0), 5)
    assert torch.allclose(steps.norm(dim=1), torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0]), atol=1e-5)
