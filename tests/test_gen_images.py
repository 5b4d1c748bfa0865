"""gen_images.py: every option changes what it should, an interrupted call goes on, and one file of patches pairs with its spots."""
import csv
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from PIL import Image
from sampling_world import GENES, MPP, PATCH_UM, PX, WIDTH, N, apart, call, make_world, pictures

import gen_images
from networks.clip import CLIP
from preprocessing.patch_file import read_patch_file
from training.data import ImageGeneDataset
from training.generated_h5 import GeneratedH5
from training.generated_pngs import GeneratedPngs
from training.sample_sheet import sample_files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("sampling"))
    np.save(folder / "embeddings.npy", np.random.default_rng(3).standard_normal((5, WIDTH)).astype(np.float32))
    return folder


def generate(world, outdir, **options):
    return call(gen_images, **{"network": world / "snapshot", "gex": world / "gex.h5ad", "outdir": outdir, **options})


def made(world, outdir: Path, **options) -> dict[str, np.ndarray]:
    result = generate(world, outdir, **options)
    assert result.exit_code == 0, result.output
    return pictures(outdir)


def of_seed(found, seed):
    """Pictures of one seed by prompt."""
    return {name.partition("_")[0]: picture for name, picture in found.items() if name.endswith(f"_seed{seed:04d}.png")}


# ---- options --------------------------------------------------------------------------------------------------------

def test_truncation_0_removes_what_z_does_and_nothing_else(world, tmp_path):
    free, bound = (made(world, tmp_path / str(psi), seeds="0-1", noise_mode="const", truncation=psi) for psi in (1, 0))
    assert apart(of_seed(free, 0), of_seed(free, 1)) > 10
    assert apart(of_seed(bound, 0), of_seed(bound, 1)) == 0
    by_prompt = list(of_seed(bound, 0).values())
    assert all((picture != by_prompt[0]).any() for picture in by_prompt[1:])      # the gene part is never truncated


def test_noise_is_drawn_with_the_seed_or_held_or_none(world, tmp_path):
    modes = {mode: made(world, tmp_path / mode, seeds="0-1", truncation=0, noise_mode=mode) for mode in ("random", "const", "none")}
    assert apart(of_seed(modes["random"], 0), of_seed(modes["random"], 1)) > 0
    for mode in ("const", "none"):
        assert apart(of_seed(modes[mode], 0), of_seed(modes[mode], 1)) == 0
    assert apart(modes["const"], modes["none"]) > 0 and apart(modes["random"], modes["const"]) > 0


def test_translate_moves_the_picture_to_the_right_and_down(world, tmp_path):
    plain, right, down = (made(world, tmp_path / where, noise_mode="none", translate=where) for where in ("0,0", "0.25,0", "0,0.25"))
    middle = np.s_[:, 6:10, 6:10]                                     # far from the borders
    still = np.stack(list(plain.values()))
    for moved, shift in ((np.stack(list(right.values())), (0, PX // 4)), (np.stack(list(down.values())), (PX // 4, 0))):
        followed = np.abs(np.roll(still, shift, axis=(1, 2)) - moved)[middle].mean()
        assert followed < 0.5 * np.abs(still - moved)[middle].mean()


def test_rotate_turns_the_picture_clockwise(world, tmp_path):
    plain, turned = (made(world, tmp_path / str(angle), noise_mode="none", rotate=angle) for angle in (0, 90))
    assert apart({name: np.rot90(picture, -1) for name, picture in plain.items()}, turned) <= 1
    assert apart(plain, turned) > 10


def test_same_seed_gives_all_prompts_one_z_and_one_noise(world, tmp_path):
    np.save(tmp_path / "twice.npy", np.ones((2, WIDTH), np.float32))
    options = {"gex": tmp_path / "twice.npy", "encoded": True, "seeds": "0-1"}
    one, each = made(world, tmp_path / "one", same_seed=True, **options), made(world, tmp_path / "each", **options)
    for seed in (0, 1):
        assert np.abs(np.subtract(*of_seed(one, seed).values())).max() == 0
        assert np.abs(np.subtract(*of_seed(each, seed).values())).max() > 0
    assert apart(of_seed(one, 0), of_seed(one, 1)) > 0


def test_n_samples_are_prompts_per_cluster_or_over_all_or_patches_a_row(world, tmp_path):
    assert len(made(world, tmp_path / "all", n_samples=3)) == 3
    grouped = made(world, tmp_path / "clusters", n_samples=3, clusters="cluster")
    assert [sum(name.startswith(folder) for name in grouped) for folder in ("cluster_stroma/", "cluster_tumour_a/")] == [3, 3]
    no_seed_twice = made(world, tmp_path / "back", seeds="5,0", n_samples=4, gex=world / "embeddings.npy", encoded=True)
    assert len(no_seed_twice) == 2 * len(made(world, tmp_path / "two", seeds="5,0", gex=world / "embeddings.npy", encoded=True))
    of_rows = made(world, tmp_path / "rows", n_samples=2, gex=world / "embeddings.npy", encoded=True)
    assert list(of_rows) == [f"prompt{row:05d}_seed{seed:04d}.png" for row in range(5) for seed in (0, 1)]


def test_encoded_rows_are_embeddings_and_others_go_through_the_gene_encoder(world, tmp_path):
    rows = np.random.default_rng(0).random((3, GENES)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)

    clip = CLIP.from_pretrained(world / "clip", image_encoder=False)
    np.save(tmp_path / "embedded.npy", clip.embed_expression(sp.csr_matrix(rows)).numpy())
    through = made(world, tmp_path / "through", gex=tmp_path / "rows.npy")
    assert apart(through, made(world, tmp_path / "straight", gex=tmp_path / "embedded.npy", encoded=True)) == 0


def test_threads_do_not_change_a_patch_and_batches_by_a_grey_level_at_most(world, tmp_path):
    plain = made(world, tmp_path / "plain", seeds="0-1", batch_sz=8)
    assert apart(plain, made(world, tmp_path / "threads", seeds="0-1", batch_sz=8, workers=5)) == 0
    assert apart(plain, made(world, tmp_path / "one", seeds="0-1", batch_sz=1)) <= 1


@pytest.mark.parametrize(("rows", "says"), [(np.ones((2, GENES - 1)) / 2, f"(prompts, {GENES})"), (np.full((2, GENES), np.nan), "NaN")],
                         ids=["width", "nan"])
def test_expression_of_wrong_width_or_with_nan_is_refused(world, tmp_path, rows, says):
    np.save(tmp_path / "bad.npy", rows)
    result = generate(world, tmp_path / "out", gex=tmp_path / "bad.npy")
    assert result.exit_code == 3 and says in result.output and not (tmp_path / "out").exists()


def test_real_patches_stand_first_in_the_grid(world, tmp_path):
    made(world, tmp_path / "out", images=world / "imgs.h5")
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png")).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(grid, (PX, PX, 3))[:, :, 0]
    with read_patch_file(world / "imgs.h5") as file:
        real = [file.images(row) for row in range(3)]
    for row, name in enumerate(list(pictures(tmp_path / "out"))[:3]):
        (y, x), (y2, x2) = (np.argwhere((windows == patch).all(axis=(2, 3, 4)))[0]
                            for patch in (real[row], pictures(tmp_path / "out")[name]))
        assert y == y2 and x < x2


# ---- an interrupted call --------------------------------------------------------------------------------------------

def times(outdir):
    return {path.relative_to(outdir).as_posix(): path.stat().st_mtime_ns for path in outdir.rglob("prompt*.png")}


def test_a_second_call_makes_only_what_is_not_there_whole(world, tmp_path):
    outdir = tmp_path / "out"
    first = made(world, outdir, batch_sz=1, seeds="0-1")
    described = [(outdir / name).read_bytes() for name in ("samples.csv", "grid.png")]
    before, names = times(outdir), list(first)
    deleted, cut, flipped, foreign, swapped = names[0], names[5], names[9], names[12], names[20]
    (outdir / deleted).unlink()
    content = (outdir / cut).read_bytes()
    (outdir / cut).write_bytes(content[:-20])
    content = bytearray((outdir / flipped).read_bytes())
    content[len(content) // 2] ^= 1
    (outdir / flipped).write_bytes(content)
    Image.new("RGB", (PX, PX)).save(outdir / foreign)
    shutil.copy(outdir / names[21], outdir / swapped)                # a whole patch of this very call, under another's name
    (outdir / "samples.csv").unlink()
    (outdir / "prompt00001_seed0000.png.tmp.1").write_bytes(b"left by a killed process")
    (outdir / "prompt00001_seed0000.png.tmp.mine").write_bytes(b"a user's")
    result = generate(world, outdir, batch_sz=1, seeds="0-1")
    assert result.exit_code == 0 and f"wrote 32 patches ({32 - 5} of them were there)" in result.output
    assert apart(first, pictures(outdir)) == 0 and [path.suffix for path in outdir.rglob("*.tmp.*")] == [".mine"]
    after = times(outdir)
    assert {name for name in names if after[name] != before[name]} == {deleted, cut, flipped, foreign, swapped}
    assert [(outdir / name).read_bytes() for name in ("samples.csv", "grid.png")] == described


def test_more_seeds_keep_the_patches_of_the_first(world, tmp_path):
    first = made(world, tmp_path / "out")
    result = generate(world, tmp_path / "out", seeds="0-1", batch_sz=1)
    assert "wrote 32 patches (16 of them were there)" in result.output
    assert apart(first, {name: pictures(tmp_path / "out")[name] for name in first}) == 0


@pytest.mark.parametrize("changes", [{"truncation": 0.5}, {"noise_mode": "const"}, {"translate": "0.1,0"}, {"rotate": 10},
                                     {"network": "other"}, {"same_seed": True}, {"gex": "changed.h5ad"}], ids=str)
def test_patches_of_other_weights_prompts_or_options_are_made_again(world, tmp_path, changes):
    adata = ad.read_h5ad(world / "gex.h5ad")
    adata.X[0, 0] += 5
    adata.write_h5ad(world / "changed.h5ad")
    changes = {name: world / value if name in ("network", "gex") else value for name, value in changes.items()}
    made(world, tmp_path / "out")
    result = generate(world, tmp_path / "out", **changes)
    assert result.exit_code == 0 and "were there" not in result.output
    assert apart(pictures(tmp_path / "out"), made(world, tmp_path / "anew", **changes)) == 0


@pytest.mark.parametrize("output", [GeneratedPngs, GeneratedH5])
def test_ctrl_c_leaves_whole_patches_says_how_to_go_on_and_the_same_command_does(world, tmp_path, monkeypatch, output):
    options = {"seeds": "0-3", "batch_sz": 4, "workers": 1, **({"out_h5": tmp_path / "out.h5"} if output is GeneratedH5 else {})}
    straight = made(world, tmp_path / "straight", seeds="0-3", batch_sz=4)
    monkeypatch.setattr("training.generated_pngs.LOOK_FOR", 3)            # 16 batches, looked for in six goes
    made(world, tmp_path / "out", truncation=0.5)                         # other patches, which these replace
    save, saved = output.save, []

    def interrupted(self, number, made):
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(number)
        return save(self, number, made)

    with monkeypatch.context() as patched:
        patched.setattr(output, "save", interrupted)
        result = generate(world, tmp_path / "out", **options)
    assert result.exit_code == 130 and "what was finished is kept, run the same command again" in result.output
    assert not (tmp_path / "out" / "samples.csv").exists() and not (tmp_path / "out.h5").exists()
    assert not list(tmp_path.rglob("*.tmp.*"))
    result = generate(world, tmp_path / "out", **options)
    assert result.exit_code == 0 and "wrote 64 patches (20 of them were there)" in result.output
    if output is GeneratedPngs:
        assert apart(straight, pictures(tmp_path / "out")) == 0
    else:
        assert (patches_in(tmp_path / "out.h5") == np.stack(list(straight.values()))).all() and not list(tmp_path.glob(".*.parts"))


# ---- one file of patches --------------------------------------------------------------------------------------------

def patches_in(path):
    with read_patch_file(path) as file:
        return file.images(slice(None))


def test_a_file_of_one_seed_pairs_with_its_spots_as_real_patches_do(world, tmp_path):
    single = made(world, tmp_path / "pngs", images=world / "imgs.h5")
    result = generate(world, tmp_path / "out", out_h5=tmp_path / "made.h5", images=world / "imgs.h5")
    assert result.exit_code == 0 and str(tmp_path / "made.h5") in result.output and not pictures(tmp_path / "out")
    generated, real = (ImageGeneDataset(sample_files(path, world / "gex.h5ad")) for path in (tmp_path / "made.h5", world / "imgs.h5"))
    assert len(generated) == N and generated.barcodes.tolist() == real.barcodes.tolist()
    for row, picture in enumerate(single.values()):
        assert (generated.read_image(row) == picture).all()
    with read_patch_file(tmp_path / "made.h5") as file, read_patch_file(world / "imgs.h5") as real_file:
        assert {name: file.attrs[name] for name in ("patch_size_src", "patch_size_target", "downsample", "pixel_size", "name")} == {
            "patch_size_src": PATCH_UM / MPP, "patch_size_target": PX, "downsample": PATCH_UM / MPP / PX, "pixel_size": MPP, "name": "S"}
        assert np.abs(file.centre_xy_px - real_file.centre_xy_px).max() <= 1
    assert (tmp_path / "out" / "grid.png").read_bytes() == (tmp_path / "pngs" / "grid.png").read_bytes()


def test_patches_of_several_seeds_are_called_by_barcode_and_seed(world, tmp_path):
    single = made(world, tmp_path / "pngs", seeds="0,3", clusters="cluster", n_samples=2)
    assert generate(world, tmp_path / "out", out_h5=tmp_path / "made.h5", seeds="0,3", clusters="cluster", n_samples=2).exit_code == 0
    rows = list(csv.DictReader(open(tmp_path / "out" / "samples.csv")))
    with read_patch_file(tmp_path / "made.h5") as file:
        assert file.barcodes == [row["key"] for row in rows] == [f"{row['barcode'].removeprefix('S__')}_seed{int(row['seed']):04d}"
                                                                 for row in rows]
    assert [row["row"] for row in rows] == [str(row) for row in range(8)] and {row["cluster"] for row in rows} == {"stroma", "tumour/a"}
    of_pngs = [row["file"] for row in csv.DictReader(open(tmp_path / "pngs" / "samples.csv"))]
    assert (patches_in(tmp_path / "made.h5") == np.stack([single[name] for name in of_pngs])).all()


def test_patches_of_an_npy_are_called_by_row_and_seed(world, tmp_path):
    result = generate(world, tmp_path / "out", gex=world / "embeddings.npy", encoded=True, out_h5=tmp_path / "made.h5")
    assert result.exit_code == 0, result.output
    with read_patch_file(tmp_path / "made.h5") as file:
        assert file.barcodes == [f"prompt{row:05d}_seed0000" for row in range(5)] and np.isnan(file.attrs["pixel_size"])


def test_a_finished_file_is_left_alone_and_other_options_make_it_again(world, tmp_path):
    path = tmp_path / "made.h5"
    assert generate(world, tmp_path / "out", out_h5=path).exit_code == 0
    before, patches = path.stat().st_mtime_ns, patches_in(path)
    result = generate(world, tmp_path / "out", out_h5=path)
    assert "wrote 16 patches (16 of them were there)" in result.output and path.stat().st_mtime_ns == before
    result = generate(world, tmp_path / "out", out_h5=path, truncation=0.5)
    assert result.exit_code == 0 and "were there" not in result.output and (patches_in(path) != patches).any()
    path.write_bytes(path.read_bytes()[:-10])
    result = generate(world, tmp_path / "out", out_h5=path)
    assert result.exit_code == 0 and (patches_in(path) == patches).all()


def test_a_damaged_block_ends_the_call_and_the_next_makes_it_anew(world, tmp_path, monkeypatch):
    finish = GeneratedH5.finish

    def damage_first(self):
        block = sorted(tmp_path.glob(".made.h5.parts/block_*"))[1]
        content = bytearray(block.read_bytes())
        content[-5] ^= 1
        block.write_bytes(content)
        return finish(self)

    options = {"out_h5": tmp_path / "made.h5", "batch_sz": 4}
    with monkeypatch.context() as patched:
        patched.setattr(GeneratedH5, "finish", damage_first)
        result = generate(world, tmp_path / "out", **options)
    assert result.exit_code == 4 and "damaged" in result.output and not (tmp_path / "made.h5").exists()
    result = generate(world, tmp_path / "out", **options)
    assert result.exit_code == 0 and "wrote 16 patches (12 of them were there)" in result.output
    assert (patches_in(tmp_path / "made.h5") == np.stack(list(made(world, tmp_path / "pngs", batch_sz=4).values()))).all()


def test_a_folder_as_the_file_of_patches_is_a_usage_error(world, tmp_path):
    assert generate(world, tmp_path / "out", out_h5=tmp_path).exit_code == 2
