"""Formats of samples and of what is computed from them, each as make(folder) -> (files to damage, read, those whose damage is noticed).

Not a test file: `test_damaged_files.py` damages them. ALWAYS_THE_SAME in place of the last: what is damaged is made anew.
"""
import json
import shutil

import anndata as ad
import numpy as np
import torch
from clip_runs import write_sample
from diffusion_world import PX, WIDTH, tiny_vae, write_world
from sampling_world import make_world
from tiny_samples import tiny_sample

from diffusion_utils.latents import cached_latents
from diffusion_utils.pairs import read_pairs
from evaluation.features import cached_features
from evaluation.latent_space import read_embedded
from networks.histo_models import build_encoder
from preprocessing.cohort import CohortConfig, CohortSample, forget_unfinished
from preprocessing.cohort_numbers import gather
from preprocessing.done_manifests import file_sha256, is_done, strings_sha256, write_done
from preprocessing.dropped_spots import write_dropped
from preprocessing.errors import InputError
from preprocessing.expression import read_expression, read_vocabulary, write_expression, write_vocabulary
from preprocessing.npy_file import RECORD
from preprocessing.outputs import write_json
from preprocessing.patch_file import read_patch_file
from preprocessing.patches import pair, read_patch, read_patch_folder
from preprocessing.slide import open_slide
from preprocessing.space_ranger import read_sample
from preprocessing.tissue import read_tissue, write_tissue
from training.clip_embed import EmbedConfig, write_embeddings
from training.patch_cache import PatchRows, cache_key, map_patches, packed_patches
from training.prompts import read_rows

ALWAYS_THE_SAME = ["always the same"]


def expression(folder):
    write_sample(folder, "S", 12, seed=0)
    path = folder / "S" / "gex_filt.h5ad"
    data = read_expression(path)
    (folder / "in").write_text("input")
    write_expression(path, data, config={"a": 1}, inputs={"in": folder / "in"})

    def read():
        found = read_expression(path)
        assert np.isfinite(found.X.data).all()
        return found.X.toarray(), found.obs_names.tolist(), found.var_names.tolist(), np.asarray(found.obsm["spatial"])

    return [path], read, []


def manifest(folder):
    """A step is skipped only where the file is as its manifest says: what is read here is whether it would be."""
    paths, _, _ = expression(folder)
    return [paths[0], paths[0].with_name("gex_filt.h5ad.done.json")], lambda: (
        is_done(paths[0], config={"a": 1}, inputs={"in": folder / "in"}) and (file_sha256(paths[0]),) or _refuse()), paths


def _refuse():
    raise InputError("gex_filt.h5ad", "manifest", "as it was", "not: the step is done again")


def patch_file(folder):
    make_world(folder)

    def read():
        with read_patch_file(folder / "imgs.h5") as file:
            return file.images(slice(0, len(file))), file.barcodes, file.centre_xy_px

    return [folder / "imgs.h5"], read, []


def patch_folder(folder):
    write_sample(folder, "S", 12, seed=0)
    patches, gex = folder / "S" / "patches", ad.read_h5ad(folder / "S" / "gex_filt.h5ad")
    names, xy = gex.obs_names.tolist(), np.asarray(gex.obsm["spatial"])

    def read():
        paths = pair(read_patch_folder(patches), names, folder / "S" / "gex_filt.h5ad", strings_sha256(names), xy)
        return [read_patch(path) for path in paths]

    files = [patches / "metadata.jsonl", patches / "stain.json", sorted(patches.glob("*.png"))[3]]
    return files, read, files


def vocabulary(folder):
    write_vocabulary(folder / "vocab.txt", [f"Gene{i}" for i in range(40)])
    return [folder / "vocab.txt"], lambda: read_vocabulary(folder / "vocab.txt"), []


def embeddings(folder):
    world = write_world(folder / "w")
    record = json.loads((world / RECORD).read_text())
    (world / RECORD).write_text(json.dumps({**record, "sha256": {"emb.npy": file_sha256(world / "emb.npy")}}))

    def read():
        pairs = read_pairs(str(world / "patches"), str(world / "emb.npy"))
        return read_rows(world / "emb.npy", WIDTH, encoded=True), pairs.patches.load_images(progress=False)

    return [world / "emb.npy", world / RECORD], read, [world / "emb.npy"]


def latents(folder):
    images, vae = PatchRows(torch.arange(5 * 3 * PX * PX, dtype=torch.uint8).reshape(5, 3, PX, PX)), tiny_vae()
    read = lambda: np.array(cached_latents(images, vae, folder / "cache", progress=False).posteriors)   # noqa: E731
    read()
    return sorted(path for path in (folder / "cache").iterdir() if "lock" not in path.name), read, ALWAYS_THE_SAME


def features(folder):
    write_sample(folder, "S", 4, seed=0)
    paths, encoder = sorted((folder / "S" / "patches").glob("*.png")), build_encoder("random_tiny")
    read = lambda: np.array(cached_features(paths, encoder, folder / "cache", progress=False)[0])       # noqa: E731
    read()
    return sorted((folder / "cache").iterdir()), read, ALWAYS_THE_SAME


def packed(folder):
    write_sample(folder, "S", 4, seed=0)
    paths = sorted((folder / "S" / "patches").glob("*.png"))
    key = cache_key(paths, [-1] * 4, 32, {"resize": "box"}, folder, program="Pillow")

    def read():
        made = packed_patches(key, folder / "cache", lambda start, stop: np.stack([
            np.ascontiguousarray(read_patch(path).transpose(2, 0, 1)) for path in paths[start:stop]]), must=True, progress=False)
        return map_patches(made).numpy().copy()

    read()
    return sorted(path for path in (folder / "cache").iterdir() if "lock" not in path.name), read, ALWAYS_THE_SAME


def latents_half_made(folder):
    """What a run killed in the middle left of them: the next goes on after the rows that the note tells."""
    images, vae = PatchRows(torch.arange(5 * 3 * PX * PX, dtype=torch.uint8).reshape(5, 3, PX, PX)), tiny_vae()
    made = cached_latents(images, vae, folder / "cache", progress=False)
    path = next((folder / "cache").glob("*.npy"))
    left = [folder / path.with_suffix(suffix).name for suffix in (".part", ".part.json")]
    shutil.copy(path, left[0])
    left[1].write_text(json.dumps({"rows": 2, "shape": made.posteriors.shape}))

    def read():
        path.unlink(missing_ok=True)
        for file in left:
            path.with_name(file.name).unlink(missing_ok=True)
            if file.is_file():
                shutil.copy(file, path.with_name(file.name))
        return np.array(cached_latents(images, vae, folder / "cache", progress=False).posteriors)

    return left, read, []


def joint_embeddings(folder):
    make_world(folder)
    config = EmbedConfig(folder / "clip", gex=folder / "gex.h5ad", out_dir=folder / "emb", device="cpu")
    write_embeddings(config)
    path = folder / "emb" / "gene_clip_emb.npy"
    return [path, path.with_name(RECORD)], lambda: vars(
        read_embedded({"S": folder / "gex.h5ad"}, {"S": folder / "emb"}, names=["gene"])), [path]


def tissue(folder):
    from shapely import to_wkt
    from shapely.geometry import MultiPolygon, box

    write_tissue(folder / "tissue.geojson", MultiPolygon([box(10, 10, 90, 80), box(100, 20, 130, 60)]))
    return [folder / "tissue.geojson"], lambda: to_wkt(read_tissue(folder / "tissue.geojson")), []


def _simulated(folder, platform, *names):
    """A simulated sample, of which extraction reads the files `names` of its Space Ranger folder."""
    made = tiny_sample(folder, platform, width_um=420, height_um=380, genes=40)
    files = [next(made.space_ranger_dir.rglob(name)) for name in names]

    def read():
        found = read_sample(made.space_ranger_dir, slide=open_slide(made.slide))
        counts = found.counts.load() if hasattr(found.counts, "load") else found.counts
        return (counts.toarray(), found.barcodes, found.gene_names, found.in_tissue, found.array_row, found.array_col, found.centre_xy_px,
                found.mpp, found.scalefactors, found.metadata, found.images)

    return made, files, read


def simulated_visium_1(folder):
    return *_simulated(folder, "visium-v1", "tissue_positions_list.csv")[1:], []


def simulated_visium_2(folder):
    return *_simulated(folder, "visium-v2", "tissue_positions.csv", "scalefactors_json.json", "filtered_feature_bc_matrix.h5",
                       "tissue_hires_image.png")[1:], []


def simulated_visium_hd(folder):
    return *_simulated(folder, "visium-hd", "tissue_positions.parquet", "scalefactors_json.json", "filtered_feature_bc_matrix.h5",
                       "clusters.csv")[1:], []


def simulated_slide(folder):
    """All its pixels, and the outline beside it. More kinds of slides: `preprocessing/test_mutated_slides.py`."""
    made = tiny_sample(folder, "visium-v2", width_um=420, height_um=380, genes=40)

    def read():
        slide = open_slide(made.slide)
        return slide.read_region(0, 0, slide.width_px, slide.height_px), str(read_tissue(made.tissue_geojson, slide))

    return [made.slide, made.tissue_geojson], read, []


def simulated_again(folder):
    """A sample stands if it is as its manifest says: what is read here is whether the same command would keep it."""
    from preprocessing.simulate_sample import _stands

    made = tiny_sample(folder, "visium-v2", width_um=420, height_um=380, genes=40)
    record = made.folder.with_name(f"{made.folder.name}.done.json")
    settings = json.loads((made.folder / "sample.json").read_text())["settings"]
    files = [made.folder / "sample.json", made.slide]
    return [*files, record], lambda: list(map(file_sha256, files)) if _stands(made.folder, settings) else _refuse(), files


def cohort(folder):
    """What the page over a cohort is made of."""
    sample = folder / "S1"
    write_sample(folder, "S1", 12, seed=0)
    data = ad.read_h5ad(sample / "gex_filt.h5ad")
    data.uns["morphology"] = {"mpp": 0.5}
    write_expression(sample / "gex.h5ad", data)
    write_dropped(sample / "dropped_spots.tsv", {"off the slide": np.array(["A-1", "B-1"])})
    write_json(sample / "patches" / "stain.json", {"normalised": True, "vectors": [[0.65, 0.07], [0.7, 0.99], [0.29, 0.11]],
                                                    "maxima": [1.9, 1.0]})
    for name, said in {"steps/extract.txt": "finished", "steps/extracted.txt": "finished", "steps/genes.txt": "failed 3",
                       "logs/genes.log": "Error: S1: genes: expected some; found none"}.items():
        (sample / name).parent.mkdir(exist_ok=True)
        (sample / name).write_text(said + "\n")
    samples = [CohortSample("S1", folder / "slide.tif")]
    read = lambda: [vars(found) for found in gather(folder, samples)]                                   # noqa: E731
    read()
    names = ("gex.h5ad", "dropped_spots.tsv", "cohort_numbers.json", "cohort_numbers.json.done.json", "patches/stain.json",
             "steps/extract.txt", "logs/genes.log")
    return [sample / name for name in names], read, [sample / "cohort_numbers.json"]


def cohort_marks(folder):
    """Which steps a cohort's next run does again."""
    write_sample(folder, "S1", 12, seed=0)
    gex, mark = folder / "S1" / "gex_filt.h5ad", folder / "S1" / "steps" / "genes.txt"
    write_done(gex, config={}, inputs={})
    mark.parent.mkdir()
    mark.write_text("finished\n")
    config = CohortConfig(samples=folder / "sheet.csv", out_dir=folder)

    def read():
        forget_unfinished(config, [CohortSample("S1", folder / "slide.tif")])
        if not mark.is_file():
            mark.write_text("finished\n")
            _refuse()
        return file_sha256(gex)

    return [mark, gex, gex.with_name(f"{gex.name}.done.json")], read, [gex]


DATA_FORMATS = (expression, manifest, patch_file, patch_folder, vocabulary, embeddings, joint_embeddings, latents, latents_half_made,
                features, packed, tissue, simulated_visium_1, simulated_visium_2, simulated_visium_hd, simulated_slide, simulated_again,
                cohort, cohort_marks)
