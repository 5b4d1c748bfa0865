"""Whatever stands in a file that a user hands over, its reader returns, or refuses it in one line that names the file.

Every reader gets damaged copies of a valid file, by hypothesis: cells, lines and bytes of a text, items of an HDF5 file, other arrays.
"""
import json
import shutil
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import tifffile
import yaml
from damage import ARRAYS, change_hdf5, damaged_hdf5, damaged_text, items_of
from fault_rounds import rounds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from visium_folders import GENES, counts_of_rows, visium_positions, write_clusters, write_hd, write_visium

from diffusion_utils.pairs import read_pairs
from diffusion_utils.prompts import read_embeddings
from evaluate_sections import read_steps
from evaluation.features import list_images
from evaluation.gene_lists import read_attributions
from evaluation.sections import read_generated
from preprocessing.anndata_sample import read_anndata_sample
from preprocessing.cohort import read_cohort_config, read_cohort_sheet
from preprocessing.errors import InputError, OptionError
from preprocessing.expression import read_expression, read_gene_map, read_vocabulary
from preprocessing.gene_sets import gene_sets_within
from preprocessing.patch_file import read_patch_file, write_patch_file
from preprocessing.patches import pair, read_patch, read_patch_folder
from preprocessing.png_folder import write_patch_folder
from preprocessing.slide import open_slide
from preprocessing.space_ranger import read_sample
from preprocessing.st_sample import read_clusters, read_counts, read_spots
from preprocessing.stain import read_stain_file
from preprocessing.tissue import read_tissue
from training.clip_config import clip_config
from training.data import expression_only, read_sample_sheet
from training.gene_changes import read_gene_changes
from training.prompts import parse_seeds, read_labels, read_rows
from training.spot_choice import read_mask

SECONDS = 10                       # for one file of a few kB; a reader that takes longer hangs
FUZZ = settings(max_examples=rounds(15, 200), derandomize=True, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck))
BARCODES = visium_positions()["barcode"][:6].tolist()


# ---- valid files ----------------------------------------------------------------------------------------------------

def visium(folder: Path, **options) -> Path:
    write_visium(folder, **options)
    write_clusters(folder, visium_positions()["barcode"][:9], ["1", "2", "3"] * 3)
    tifffile.imwrite(folder.parent / "slide.tif", np.full((1200, 1100, 3), 200, np.uint8), tile=(64, 64), photometric="rgb")
    return folder


def section(folder: Path, **options) -> None:
    sample = read_sample(folder, **options)
    assert np.isfinite(counts_of_rows(sample)).all() and np.isfinite(sample.centre_xy_px[sample.in_tissue]).all() and sample.mpp > 0


def patches(folder: Path) -> Path:
    write_patch_folder(folder / "patches", np.full((6, 8, 8, 3), 99, np.uint8), barcodes=BARCODES, sample_id="S",
                       xy=np.arange(12.0).reshape(6, 2), stain={"normalised": False})
    np.save(folder / "emb.npy", np.ones((6, 3), np.float32))
    (folder / "embeddings.json").write_text(json.dumps({"barcode_sha256": "0", "files": ["emb.npy"], "gex": str(folder / "gex.h5ad")}))
    return folder / "patches"


def generated(folder: Path) -> Path:
    patches(folder)
    names = sorted(path.name for path in (folder / "patches").glob("*.png"))
    rows = "".join(f"{name},{row},{BARCODES[row]},{seed}\n" for row, (name, seed) in enumerate(zip(names, [0] * 6, strict=True)))
    (folder / "patches" / "samples.csv").write_text("file,prompt,barcode,seed\n" + rows)
    return folder / "patches"


def gex(path: Path, write=True) -> Path:
    counts = np.random.default_rng(0).poisson(2, (6, 4)).astype(np.float32)
    sample = ad.AnnData(counts, obs={"in_tissue": [1] * 6, "array_row": [0, 0, 1, 1, 2, 2], "array_col": [0, 2, 1, 3, 0, 2],
                                     "sample_id": ["S"] * 6, "cluster": ["a", "b"] * 3, "n_members": [1] * 6},
                        var={"gene_ids": list("wxyz")}, obsm={"spatial": np.arange(12.0).reshape(6, 2) * 100})
    sample.obs_names, sample.var_names = BARCODES, GENES[:3] + ["Xkr4"]
    sample.uns["spatial"] = {"S": {"scalefactors": {"spot_diameter_fullres": 130.0}, "images": {"lowres": np.zeros((9, 9, 3), np.uint8)}}}
    sample.uns["morphology"] = {"mpp": 0.5, "patch_um": 55.0, "barcode_sha256": "0"}
    sample.layers["counts"] = counts
    sample.write_h5ad(path)
    return path


def sheet(path: Path, columns: str) -> None:
    names = columns.split(",")
    cells = {"sample_id": "S{}", "wsi_file": "slide{}.tif", "gex_file": "gex{}.h5ad", "mpp": "0.5", "spot_um": "55", "images": "patches{}",
             "gex": "gex{}.h5ad", "split": "train", "embeddings": "emb{}.npy"}
    path.write_text("\n".join([columns, *(",".join(cells[name].format(i) for name in names) for i in range(3))]) + "\n")


# ---- texts: reader -> (write the valid files in a folder, which of them is damaged, read) ----------------------------

def text(content: str):
    return lambda folder: (folder / "f").write_text(content)


def read_yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}                            # said by train_clip.py's door; here the content is what matters


CONFIG = "data: {train_gex: a, max_size: 5, val_fraction: 0.1}\nmodel: {gene_hidden: 8, dropout: 0.1}\ntrainer: {max_epochs: 2}\nseed: 1\n"
COHORT = "samples: sheet.csv\nout_dir: out\nmemory_gb: 4\nstride: 5\n"
GEOJSON = json.dumps({"type": "FeatureCollection", "features": [
    {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [[[1, 1], [90, 1], [90, 80], [1, 80], [1, 1]]]}},
    {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [3, 4]}]}}]})
STAIN_JSON = json.dumps({"normalised": True, "vectors": [[0.65, 0.07], [0.7, 0.99], [0.29, 0.11]], "maxima": [1.9, 1.0], "n_pixels": 9})
ST_COUNTS = "\tG1\tG2\tG3\n" + "".join(f"{x}x{y}\t{x}\t{y}\t3\n" for x in range(2) for y in range(3))
ST_SPOTS = "x\ty\tpixel_x\tpixel_y\tselected\n" + "".join(f"{x}\t{y}\t{x * 100}\t{y * 99}\t1\n" for x in range(2) for y in range(3))
ST_LABELS = "x\ty\tlabel\n" + "".join(f"{x}\t{y}\tcluster {x}\n" for x in range(2) for y in range(3))
TEXTS = {
    "positions without header": (lambda f: visium(f / "v", version=1), "v/spatial/tissue_positions_list.csv",
                                 lambda f: section(f / "v")),
    "positions with header": (lambda f: visium(f / "v"), "v/spatial/tissue_positions.csv", lambda f: section(f / "v")),
    "positions, with a slide": (lambda f: visium(f / "v"), "v/spatial/tissue_positions.csv",
                                lambda f: section(f / "v", slide=open_slide(f / "slide.tif"))),
    "scale factors": (lambda f: visium(f / "v"), "v/spatial/scalefactors_json.json", lambda f: section(f / "v")),
    "scale factors of Visium HD": (lambda f: write_hd(f / "v"), "v/binned_outputs/square_002um/spatial/scalefactors_json.json",
                                   lambda f: section(f / "v")),
    "10x matrix.mtx": (lambda f: visium(f / "v", matrix="mtx"), "v/filtered_feature_bc_matrix/matrix.mtx", lambda f: section(f / "v")),
    "10x features.tsv": (lambda f: visium(f / "v", matrix="mtx"), "v/filtered_feature_bc_matrix/features.tsv",
                         lambda f: section(f / "v")),
    "10x barcodes.tsv": (lambda f: visium(f / "v", matrix="mtx"), "v/filtered_feature_bc_matrix/barcodes.tsv",
                         lambda f: section(f / "v")),
    "10x matrix.mtx.gz": (lambda f: visium(f / "v", matrix="mtx.gz"), "v/filtered_feature_bc_matrix/matrix.mtx.gz",
                          lambda f: section(f / "v")),
    "10x clusters": (lambda f: visium(f / "v"), "v/analysis/clustering/gene_expression_graphclust/clusters.csv",
                     lambda f: section(f / "v")),
    "ST counts": (text(ST_COUNTS), "f", lambda f: read_counts(f / "f")),
    "ST positions": (text(ST_SPOTS), "f", lambda f: read_spots(f / "f")),
    "ST labels": (text(ST_LABELS), "f", lambda f: read_clusters(f / "f", ["0x0", "1x2"])),
    "vocabulary": (text("Actb\nUmod\nNphs1\nXkr4\n"), "f", lambda f: read_vocabulary(f / "f")),
    "gene map": (text("ENS1\tActb\nENS2\tUmod\nENS3\t\n"), "f", lambda f: read_gene_map(f / "f")),
    "gene sets": (text("GLYCOLYSIS\thttp://x\tActb\tUmod\nHYPOXIA\t\tNphs1,1.0\tUmod\n"), "f", lambda f: gene_sets_within(f / "f", GENES)),
    "gene changes": (text("Actb:+2\nUmod:0 # off\n"), "f", lambda f: read_gene_changes(str(f / "f"), ["Actb", "Umod"])),
    "cluster labels": (text("barcode,cluster\n" + "".join(f"b{i},c{i % 2}\n" for i in range(6))), "f",
                       lambda f: read_labels(str(f / "f"), None, f / "f", 6)),
    "mask": (text("barcode,keep\n" + "".join(f"b{i},{i % 2}\n" for i in range(6))), "f", lambda f: read_mask(str(f / "f"), 6, None, "f")),
    "sample sheet": (lambda f: sheet(f / "f", "sample_id,images,gex,split,embeddings"), "f", lambda f: read_sample_sheet(f / "f")),
    "cohort sheet": (lambda f: sheet(f / "f", "sample_id,wsi_file,gex_file,mpp,spot_um"), "f", lambda f: read_cohort_sheet(f / "f")),
    "cohort settings": (text(COHORT), "f", lambda f: read_cohort_config(mapping(read_yaml(f / "f")))),
    "CLIP settings": (text(CONFIG), "f", lambda f: clip_config(mapping(read_yaml(f / "f")))),
    "metadata.jsonl": (lambda f: patches(f), "patches/metadata.jsonl",
                       lambda f: pair(read_patch_folder(f / "patches"), BARCODES, f / "gex.h5ad", None, np.arange(12.0).reshape(6, 2))),
    "stain.json of a folder": (lambda f: patches(f), "patches/stain.json", lambda f: read_patch_folder(f / "patches")),
    "stain.json": (text(STAIN_JSON), "f", lambda f: read_stain_file(f / "f")),
    "embeddings.json": (lambda f: patches(f), "embeddings.json", lambda f: read_pairs(str(f / "patches"), str(f / "emb.npy"))),
    "samples.csv": (lambda f: generated(f), "patches/samples.csv", lambda f: read_generated(f / "patches", "S", BARCODES)),
    "samples.csv for metrics": (lambda f: generated(f), "patches/samples.csv", lambda f: list_images(f / "patches")),
    "GeoJSON": (text(GEOJSON), "f", lambda f: read_tissue(f / "f")),
    "attributions": (text("gene,0 vs. 1,1 vs. 0\nActb,0.5,0.1\nUmod,-1,2\n"), "f", lambda f: read_attributions(f / "f")),
    "step times, JSON": (text('{"step": "a", "seconds": 1}\n{"step": "b", "seconds": 2.5}\n'), "f", lambda f: read_steps(f / "f")),
    "step times, CSV": (text("step,seconds\na,1\nb,2\n"), "f", lambda f: read_steps(f / "f")),
    "seeds": (text("0,1,4-6"), "f", lambda f: parse_seeds((f / "f").read_text(errors="replace"))),
    "PNG patch": (lambda f: patches(f), "patches/patch_1.png", lambda f: read_patch(f / "patches" / "patch_1.png")),
}


def mapping(content) -> dict:
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def check(read, folder: Path, damaged: Path) -> None:
    """Reading ends in time, with a result or with one line that names the file (or one read together with it)."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except OptionError as error:
        assert "\n" not in str(error).strip()
    except InputError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 2000, str(error)[:3000]
        assert str(folder) in str(error), "the file is named"
    assert time.monotonic() - start < SECONDS, "it hangs"


@pytest.mark.fault("fuzzed text")
@pytest.mark.parametrize("reader", TEXTS)
def test_a_damaged_text_is_read_or_refused_in_one_line(reader, tmp_path, tried):
    write, name, read = TEXTS[reader]
    write(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    check(read, tmp_path, path)

    @FUZZ
    @given(damaged_text(content))
    def one(damaged):
        path.write_bytes(damaged)
        tried()
        check(read, tmp_path, path)

    one()


# ---- HDF5 files and arrays ------------------------------------------------------------------------------------------

def read_images(path: Path) -> None:
    with read_patch_file(path) as file:
        file.images(slice(0, len(file)))
        assert file.barcodes is None or len(file.barcodes) == len(file)
        file.recorded_xy_px  # noqa: B018


def expression(path: Path) -> None:
    data = read_expression(path)
    assert np.isfinite(data.X.sum())


HDF5 = {
    "10x matrix": (lambda f: visium(f / "v"), "v/filtered_feature_bc_matrix.h5", lambda f: section(f / "v")),
    "10x matrix of Visium HD": (lambda f: write_hd(f / "v"), "v/binned_outputs/square_002um/filtered_feature_bc_matrix.h5",
                                lambda f: section(f / "v")),
    "imgs.h5": (lambda f: write_patch_file(f / "f", np.zeros((6, 8, 8, 3), np.uint8), count=6, patch_px=8, coords=np.zeros((6, 2), int),
                                           barcodes=BARCODES, patch_size_src=8.0, pixel_size=0.5, name="S"), "f",
                lambda f: read_images(f / "f")),
    "h5ad as a sample": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: read_anndata_sample(f / "f.h5ad")),
    "h5ad as expression": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: expression(f / "f.h5ad")),
    "h5ad to train on": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: expression_only(f / "f.h5ad")),
}


@pytest.mark.fault("fuzzed HDF5 file")
@pytest.mark.parametrize("reader", HDF5)
def test_an_hdf5_file_with_other_items_is_read_or_refused_in_one_line(reader, tmp_path, tried):
    write, name, read = HDF5[reader]
    write(tmp_path)
    path, copy = tmp_path / name, tmp_path / "copy"
    check(read, tmp_path, path)
    shutil.copy(path, copy)

    @FUZZ
    @given(damaged_hdf5(items_of(path)))
    def one(changes):
        shutil.copy(copy, path)
        change_hdf5(path, changes)
        tried()
        check(read, tmp_path, path)

    one()


NPY = {"embeddings": lambda f: read_embeddings(f / "f.npy", 5), "expression rows": lambda f: read_rows(f / "f.npy", 5, False),
       "labels": lambda f: read_labels(str(f / "f.npy"), None, f / "f.npy", 6), "mask": lambda f: read_mask(str(f / "f.npy"), 6, None, "f")}


@pytest.mark.fault("fuzzed array")
@pytest.mark.parametrize("reader", NPY)
def test_another_array_is_read_or_refused_in_one_line(reader, tmp_path, tried):
    path = tmp_path / "f.npy"
    np.save(path, np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5))
    content = path.read_bytes()
    arrays = {**ARRAYS, "texts": np.array(["a", "b", ""] * 2), "labels": np.arange(6) % 2, "rows": np.full((6, 5), 0.5)}
    anything = st.one_of(damaged_text(content), st.sampled_from([*arrays, "objects", "several", "dates"]))

    @FUZZ
    @given(anything)
    def one(what):
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what == "several":
            np.savez(path.with_suffix(".npz"), a=np.ones(2))
            shutil.move(path.with_suffix(".npz"), path)
        else:
            special = {"objects": np.array([{}, None] * 3, object), "dates": np.array(["2020-01-01", "NaT"] * 3, "M8[D]")}
            np.save(path, arrays[what] if what in arrays else special[what], allow_pickle=True)
        tried()
        check(NPY[reader], tmp_path, path)

    one()


@pytest.mark.fault("fuzzed parquet file")
def test_a_damaged_parquet_table_is_read_or_refused_in_one_line(tmp_path, tried):
    import pandas as pd
    write_hd(tmp_path / "v")
    path = next(tmp_path.rglob("tissue_positions.parquet"))
    content, table = path.read_bytes(), pd.read_parquet(path)
    values = {"words": "x", "none": None, "nan": np.nan, "fractions": 1.5, "huge": 2 ** 40, "negative": -1, "bytes": b"\xff",
              "lists": [[1, 2]] * len(table), "dates": pd.Timestamp("2020-01-01"), "truths": True}
    other = st.tuples(st.sampled_from(list(table.columns)), st.sampled_from([*values, "gone", "twice"]))

    @FUZZ
    @given(st.one_of(damaged_text(content), other))
    def one(what):
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            column, kind = what
            changed = table.drop(columns=column) if kind == "gone" else pd.concat([table, table[:3]]) if kind == "twice" else \
                table.assign(**{column: values[kind]})
            changed.to_parquet(path, index=False)
        tried()
        check(lambda f: section(f / "v"), tmp_path, path)

    one()
