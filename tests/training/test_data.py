"""ImageGeneDataset: the right image beside the right genes, from one sample or many, in any process."""
import pickle

import numpy as np
import pytest
import torch
from paired_samples import BARCODES, GENES, two_samples, write_sample
from PIL import Image
from torch.utils.data import DataLoader

from preprocessing.errors import InputError, OptionError
from preprocessing.expression import normalise_expression, read_expression, write_expression
from preprocessing.patch_file import write_patch_file
from training.data import ImageGeneDataset, expression_only, spatial_block_split
from training.sample_sheet import SampleFiles, read_sample_sheet, sample_files


def rows_are_paired(dataset, levels=(0,)):
    """Every image's grey level tells its row and sample, every expression vector its row."""
    for i in range(len(dataset)):
        image, expression = dataset[i]
        row, level = divmod(int(image[0, 0, 0]), 20)
        sample = levels.index(level)
        ratio = np.expm1(expression[0].item()) / np.expm1(expression[1].item())
        if round(ratio) != row + 1 or dataset.barcodes[i] != f"S{sample + 1}__{BARCODES[row]}":
            return False
    return True


@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_every_row_is_a_patch_and_its_expression(tmp_path, images):
    dataset = ImageGeneDataset([write_sample(tmp_path / "S1", "S1", images)])
    image, expression = dataset[4]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and expression.dtype == torch.float32 and expression.shape == (3,)
    assert len(dataset) == 10 and dataset.gene_names == GENES and rows_are_paired(dataset)
    assert dataset.obs["cluster"].tolist()[:4] == ["0", "1", "2", "0"] and (dataset.centre_xy_px[:, 0] == np.arange(10) * 100).all()


@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_a_resorted_h5ad_stays_paired(tmp_path, images):
    sample = write_sample(tmp_path / "S1", "S1", images)
    order = np.random.default_rng(0).permutation(10)
    write_expression(sample.gex, read_expression(sample.gex)[order].copy())
    dataset = ImageGeneDataset([sample])
    assert rows_are_paired(dataset) and dataset.barcodes[0] == f"S1__{BARCODES[order[0]]}"


@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_the_expression_of_another_sample_is_refused(tmp_path, images):
    first = write_sample(tmp_path / "S1", "S1", images)
    other = write_sample(tmp_path / "S2", "S2", images, barcodes=[barcode.replace("A", "T") for barcode in BARCODES])
    with pytest.raises(InputError, match=r"no patch for 10 \(TTTC00-1"):
        ImageGeneDataset([SampleFiles("S1", first.images, other.gex)])


@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_another_sample_with_the_very_same_barcodes_is_refused_by_its_name(tmp_path, images):
    first, other = (write_sample(tmp_path / name, name, images) for name in ("S1", "S2"))
    with pytest.raises(InputError, match="sample_id: expected S2, as .* says; found S1"):
        ImageGeneDataset([SampleFiles("S1", first.images, other.gex)])


def test_metadata_lines_of_another_sample_are_refused_naming_them(tmp_path):
    sample = write_sample(tmp_path / "S1", "S1")
    lines = (sample.images / "metadata.jsonl").read_text().splitlines()
    lines[2:4] = [line.replace('"sample_id": "S1"', '"sample_id": "S2"') for line in lines[2:4]]
    (sample.images / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"sample_id: expected S1, as .*; found S2 of 2 \(AAAC02-1, AAAC03-1\)"):
        ImageGeneDataset([sample])


@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_barcodes_moved_onto_other_rows_are_refused(tmp_path, images):
    sample = write_sample(tmp_path / "S1", "S1", images)
    adata = read_expression(sample.gex)
    adata.obs_names = BARCODES[1:] + BARCODES[:1]
    adata.write_h5ad(sample.gex)
    with pytest.raises(InputError, match="positions: expected every patch within 2 px of its spot"):
        ImageGeneDataset([sample])


@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_an_h5ad_sorted_twice_stays_paired_without_positions(tmp_path, images):
    from preprocessing.dump_patches import dump_patches_to_folder_single
    sample = write_sample(tmp_path / "S1", "S1", "imgs.h5")
    order = np.random.default_rng(0).permutation(10)
    adata = read_expression(sample.gex)
    del adata.obsm["spatial"]
    write_expression(tmp_path / "S1" / "gex.h5ad", adata[order].copy())
    if images == "patches":
        dump_patches_to_folder_single(sample.images, None, tmp_path / "S1" / "patches", normalize=False)
    for rows in (np.arange(10), order, order[::-1]):
        write_expression(sample.gex, adata[rows].copy())
        assert rows_are_paired(ImageGeneDataset([SampleFiles("S1", tmp_path / "S1" / images, sample.gex)]))


def test_images_that_are_not_there_are_refused(tmp_path):
    sample = write_sample(tmp_path / "S1", "S1")
    with pytest.raises(InputError, match="gone: images: expected a patch folder or an imgs.h5; found nothing there"):
        ImageGeneDataset([SampleFiles("S1", tmp_path / "gone", sample.gex)])


def test_patches_at_random_places_have_no_expression(tmp_path):
    sample = write_sample(tmp_path / "S1", "S1", "imgs.h5")
    patches = np.zeros((10, 8, 8, 3), np.uint8)
    write_patch_file(sample.images, patches, count=10, patch_px=8, coords=np.zeros((10, 2), int), barcodes=None, patch_size_src=16,
                     pixel_size=0.5, name="S1")
    with pytest.raises(InputError, match="imgs.h5: barcode: expected one a patch; found none"):
        ImageGeneDataset([sample])


# ---- several samples ----

def test_samples_that_share_barcodes_are_keyed_and_fully_paired(tmp_path):
    dataset = ImageGeneDataset(two_samples(tmp_path))
    assert len(dataset) == 20 and len(set(dataset.barcodes)) == 20 and rows_are_paired(dataset, levels=(0, 7))
    assert dataset.obs["cluster"].cat.categories.tolist() == ["0", "1", "2"]
    assert dataset.sample_ids.tolist() == ["S1"] * 10 + ["S2"] * 10 and dataset.obs.index.tolist() == dataset.barcodes.tolist()


def test_expression_is_normalised_per_sample(tmp_path):
    samples = two_samples(tmp_path)
    dataset = ImageGeneDataset(samples, target_sum="median")
    for start, sample in zip((0, 10), samples, strict=True):
        alone = normalise_expression(read_expression(sample.gex).X, "median")
        assert np.allclose(dataset.expression[start:start + 10].toarray(), alone.toarray())
    to_target = ImageGeneDataset(samples, target_sum=1e4).expression
    assert np.allclose(np.expm1(to_target.toarray()).sum(axis=1), 1e4, rtol=1e-4)
    assert np.allclose(to_target[:10].toarray(), to_target[10:].toarray(), atol=1e-4)     # ten times deeper, same profile


@pytest.mark.parametrize("genes, message", [
    (["Umod", "Aqp2", "Actb"], "first difference at gene 2: Actb expected, Aqp2 found"),
    (["Umod", "Actb"], "found 2; first difference at gene 3: Aqp2 expected, no gene found"),
    (["Umod", "Actb", "Aqp2", "Xkr4"], "found 4; first difference at gene 4: no gene expected, Xkr4 found"),
], ids=["other order", "fewer", "more"])
def test_samples_of_another_vocabulary_are_refused_naming_the_first_difference(tmp_path, genes, message):
    samples = [write_sample(tmp_path / "one", "S1"), write_sample(tmp_path / "two", "S2", genes=genes)]
    with pytest.raises(InputError, match=message):
        ImageGeneDataset(samples)
    with pytest.raises(InputError, match="genes of the vocabulary of the weights"):
        ImageGeneDataset(samples[1:], vocabulary=GENES)


def test_expression_without_images_is_the_same_table(tmp_path):
    samples = two_samples(tmp_path)
    table, dataset = expression_only(samples), ImageGeneDataset(samples)
    assert (table.expression != dataset.expression).nnz == 0 and table.barcodes.tolist() == dataset.barcodes.tolist()
    assert expression_only(samples[1].gex).sample_ids.tolist() == ["S2"] * 10


def test_normalised_files_need_to_be_meant(tmp_path):
    sample = write_sample(tmp_path / "S1", "S1")
    adata = read_expression(sample.gex)
    adata.X = normalise_expression(adata.X, 1e4)
    adata.write_h5ad(sample.gex)
    with pytest.raises(InputError, match="normalised or logged already"):
        ImageGeneDataset([sample])
    assert np.allclose(ImageGeneDataset([sample], already_normalised=True).expression.toarray(), adata.X.toarray())


# ---- images ----

def test_smaller_images_are_area_means(tmp_path):
    sample = write_sample(tmp_path / "S1", "S1")
    checkers = np.indices((8, 8)).sum(axis=0) % 2 * 200
    Image.fromarray(np.repeat(checkers[..., None], 3, axis=2).astype(np.uint8)).save(sample.images / "patch_0.png")
    dataset = ImageGeneDataset([sample], image_px=4)
    assert (dataset[0][0] == 100).all() and dataset[0][0].shape == (3, 4, 4)
    assert (dataset.load_images(progress=False) == torch.stack([dataset[i][0] for i in range(10)])).all()


@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_all_images_in_memory_equal_the_rows(tmp_path, images):
    dataset = ImageGeneDataset([write_sample(tmp_path / "S1", "S1", images)])
    loaded = dataset.load_images(progress=False)
    assert loaded.dtype == torch.uint8 and (loaded == torch.stack([dataset[i][0] for i in range(10)])).all()
    assert dataset.load_images(16, progress=False).shape == (10, 3, 16, 16)


@pytest.mark.parametrize("shape, message", [((8, 6, 3), "expected a square patch; found 6 x 8 px"),
                                            ((9, 9, 3), "8 x 8 px as the first patch; found 9 x 9")])
def test_patches_of_another_shape_are_refused_by_name(tmp_path, shape, message):
    sample = write_sample(tmp_path / "S1", "S1")
    Image.fromarray(np.zeros(shape, np.uint8)).save(sample.images / "patch_3.png")
    with pytest.raises(InputError, match=f"patch_3.png: size: .*{message}"):
        ImageGeneDataset([sample]).load_images(progress=False)


def test_the_transform_sees_the_image_only(tmp_path):
    dataset = ImageGeneDataset([write_sample(tmp_path / "S1", "S1")], transform=lambda image: image.float() + 0.5)
    assert dataset[2][0][0, 0, 0] == 40.5


def test_a_seeded_subset_keeps_its_pairs(tmp_path):
    samples = two_samples(tmp_path)
    some, again, other = (ImageGeneDataset(samples, max_size=6, seed=seed) for seed in (0, 0, 1))
    assert len(some) == 6 and rows_are_paired(some, levels=(0, 7)) and some.expression.shape == (6, 3)
    assert some.barcodes.tolist() == again.barcodes.tolist() != other.barcodes.tolist()
    assert len(ImageGeneDataset(samples, max_size=100)) == 20


# ---- processes ----

@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
def test_an_hdf5_file_opened_before_workers_start_gives_the_same_values(tmp_path, start, workers):
    dataset = ImageGeneDataset([write_sample(tmp_path / "S1", "S1", "imgs.h5")])
    alone = torch.stack([dataset[i][0] for i in range(10)])                         # the file is open from here on
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, multiprocessing_context=start)
    assert (torch.cat([images for images, _ in loader]) == alone).all()
    assert (dataset[9][0] == alone[9]).all()


def test_the_data_set_is_pickled_without_open_files(tmp_path):
    dataset = ImageGeneDataset([write_sample(tmp_path / "S1", "S1", "imgs.h5")])
    before = dataset[3]
    after = pickle.loads(pickle.dumps(dataset))[3]
    assert (before[0] == after[0]).all() and (before[1] == after[1]).all()


# ---- naming samples ----

def test_comma_lists_take_their_names_from_the_h5ad(tmp_path):
    one, two = two_samples(tmp_path)
    assert sample_files(f"{one.images}, {two.images}", f"{one.gex}, {two.gex}") == [one, two]


@pytest.mark.parametrize("images, gex", [("a,b", "c"), ("a", "c,d"), ("", "")])
def test_comma_lists_of_unequal_length_are_refused(images, gex):
    with pytest.raises(OptionError, match="two comma-separated lists of equal length"):
        sample_files(images, gex)


def test_one_file_named_twice_is_refused(tmp_path):
    one, _ = two_samples(tmp_path)
    with pytest.raises(OptionError, match="every file once"):
        sample_files(f"{one.images},{one.images}", f"{one.gex},{one.gex}")


def test_a_sample_sheet_names_files_beside_itself(tmp_path):
    one, two = two_samples(tmp_path)
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"sample_id,images,gex,split\n,,,\nS1,one/patches,one/gex_filt.h5ad,train\nS2,{two.images},{two.gex},val\n ,,,\n")
    samples = read_sample_sheet(sheet)
    assert [(sample.sample_id, sample.split) for sample in samples] == [("S1", "train"), ("S2", "val")]
    assert rows_are_paired(ImageGeneDataset(samples), levels=(0, 7))


@pytest.mark.parametrize("text, message", [
    ("sample_id,images\nS1,a\n", "columns: expected sample_id, images, gex, split; found no gex"),
    ("sample_id,images,gex\n", "rows: expected one a sample; found none"),
    ("sample_id,images,gex\nS1,a,b\nS1,c,d\n", r"every sample once; found repeated 1 \(S1\)"),
    ("sample_id,images,gex,split\nS1,a,b,validation\n", "line 2: .* one of train, val, test; found split validation"),
    ("sample_id,images,gex\nS1,,b\n", "line 2: .*found no images"), ("sample_id,images,gex\n\n,,\nS1,,b\n", "line 4: .*found no images"),
], ids=["no column", "no rows", "repeated", "unknown split", "empty cell", "after empty lines"])
def test_a_wrong_sample_sheet_is_refused(tmp_path, text, message):
    (tmp_path / "sheet.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_sample_sheet(tmp_path / "sheet.csv")


# ---- validation inside a sample ----

def grid(n=20, pitch=100.0):
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2) * pitch


def test_a_spatial_block_is_compact_and_no_pixel_is_on_both_sides():
    xy = np.concatenate([grid(), grid()])
    samples = np.repeat(["S1", "S2"], 400)
    train, val = spatial_block_split(xy, samples, val_fraction=0.1, buffer_px=100.5, seed=3)
    for sample in ("S1", "S2"):
        held, kept = xy[val[samples[val] == sample]], xy[train[samples[train] == sample]]
        assert len(held) == 40 and np.ptp(held, axis=0).max() <= 1300
        gaps = np.abs(held[:, None] - kept[None]).max(axis=2)
        assert gaps.min() == 200.0
    assert not set(train) & set(val)


def test_a_spatial_split_is_seeded():
    one, again, other = (spatial_block_split(grid(), np.repeat("S1", 400), 0.2, 0, seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert one == again != other


@pytest.mark.parametrize("fraction, buffer, message", [(0, 0, "between 0 and 1"), (1.0, 0, "between 0 and 1"),
                                                       (0.2, 1e9, "some spots left to train on; found none")])
def test_a_split_that_leaves_nothing_is_refused(fraction, buffer, message):
    with pytest.raises(OptionError, match=message):
        spatial_block_split(grid(), np.repeat("S1", 400), fraction, buffer)


def test_a_split_needs_positions():
    with pytest.raises(InputError, match=r"S1: obsm\['spatial'\]: expected the position of every spot"):
        spatial_block_split(np.full((4, 2), np.nan), np.repeat("S1", 4), 0.2, 1)
