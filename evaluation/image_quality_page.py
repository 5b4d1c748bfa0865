"""The page of `calculate_image_quality_metrics.py --report`: numbers with n, floors and intervals, and patches to look at."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation import page
from evaluation.contact_sheet import contact_sheet
from evaluation.features import read_samples_csv
from evaluation.image_quality import DIVERSITY, SHARES, ImageSet, QualityConfig
from preprocessing.done_manifests import program_versions
from preprocessing.outputs import locked, nan_to_none, write_json
from preprocessing.patches import read_patch, read_patch_folder

ROWS, COLUMNS = 8, 8
CELL_PX = 96


def write_quality_report(path: Path, config: QualityConfig, reference: ImageSet, generated: ImageSet,
                         rows: Sequence[dict[str, object]], more_parts: Sequence[str] = (),
                         more_numbers: Mapping[str, object] | None = None) -> None:
    """Write the page, and the same numbers and settings as JSON beside it. `more_parts` and `more_numbers`: what else was measured."""
    settings = {"experiment": config.experiment, "reference": reference.name, "generated": generated.name, "seed": config.seed,
                "images a side at most": config.num, "splits": config.n_splits,
                **{f"weights of {row['features']} (SHA-256)": row["weights_sha256"] for row in rows}}
    sheet, caption = patches_side_by_side(reference, generated, np.random.default_rng(config.seed))
    parts = [page.paragraph(lead(rows), "lead"), *number_tables(rows), page.heading("Real and generated"), page.picture(sheet, caption),
             *more_parts, page.heading("How to read this"), page.paragraph(
                 "Both distances grow as n shrinks, so compare the generated patches with the real-vs-real floor at the same n, never with "
                 "a number from elsewhere. Neither sees whether a patch follows its genes. Intervals are 95 %: of the whole by "
                 "delete-half jackknife, at the floor's n over random halves."),
             page.heading("Settings, weights, versions"), page.facts({**settings, **program_versions()})]
    numbers = path.with_suffix(".json")
    with locked(path, covers=[numbers]):
        page.write_page(path, page.page(f"Image quality: {config.experiment}", parts))
        write_json(numbers, {"rows": nan_to_none(list(rows)), **(more_numbers or {}), "settings": settings, "versions": program_versions()})


def lead(rows: Sequence[dict[str, object]]) -> str:
    """What the first feature set says, in a sentence."""
    row = rows[0]
    times = row["FID_at_floor_n"] / row["FID_floor"] if row["FID_floor"] > 0 else float("inf")
    n = f"n = {row['n_floor']:,}"
    apart = row["FID_at_floor_n_low"] > row["FID_floor_high"]
    verdict = (f"lie {page.number(times)} times as far from real ones as two halves of these from each other, at {n}" if apart
               else f"are not told apart from real ones at {n}: the intervals overlap")
    caution = f" Caution: {row['flags']}." if row["flags"] else ""
    return f"In {row['features']} features the generated patches {verdict}.{caution}"


def number_tables(rows: Sequence[dict[str, object]]) -> list[str]:
    """All images, and equal n beside the floor."""
    whole = [[row["features"], row["n_reference"], row["n_generated"], interval(row, "FID"),
              page.with_interval(row["KID_mean"], row["KID_low"], row["KID_high"])] for row in rows]
    equal = [[f"{name}, {row['features']}", row["n_floor"], interval(row, f"{name}_at_floor_n"), interval(row, f"{name}_floor")]
             for row in rows for name in ("FID", "KID")]
    return [page.heading("Distances"),
            page.table(["features", "n real", "n generated", "FID", "KID"], whole,
                       "All images; in brackets the 95 % interval. FID proper is the row of the Inception features."),
            page.table(["distance", "n a side", "generated to real", "real to real (floor)"], equal,
                       "At equal n, over random halves of the real patches"),
            page.table(["features", "FID at n", "FID at infinite n"],
                       [[row["features"], row["FID"], interval(row, "FID_infinite")] for row in rows],
                       "The straight line of the distance in 1/n, followed to infinitely many images (Chong & Forsyth 2020): what is left "
                       "of it without the bias of few. Below four images a number of a feature it still lies too high."),
            *cluster_tables(rows),
            page.table(["features", *SHARES], [[row["features"], *(row[name] for name in SHARES)] for row in rows],
                       "As many images a side as the smaller has, balls to the 5th neighbour. Precision: generated patches that look real. "
                       "Coverage: real patches that have a generated one near; a generator that repeats itself covers few."),
            *diversity_table(rows)]


def diversity_table(rows: Sequence[dict[str, object]]) -> list[str]:
    """Where samples.csv names prompts of several seeds."""
    if rows[0].get(DIVERSITY[0], "") == "":
        return []
    return [page.table(["features", "one prompt", "different prompts"],
                       [[row["features"], *(row[name] for name in DIVERSITY)] for row in rows],
                       "Mean distance between the features of two generated patches, of one prompt (from seed to seed) and of different "
                       "prompts. Near 0 for one prompt: the generator does not listen to its noise.")]


def cluster_tables(rows: Sequence[dict[str, object]]) -> list[str]:
    """Cluster by cluster in the first feature set, where clusters are known."""
    found = rows[0].get("by_cluster")
    if not found:
        return []

    def said(row: dict[str, object], name: str) -> str | None:
        value = row.get(name)
        return None if value is None else page.with_interval(value["mean"], *value["ci95"])

    counts, sides = ("n_reference", "n_generated", "n_floor"), ("generated", "others", "real")
    heads = ["made for it", "made for others", "real (floor)"]
    return [page.heading("By cluster"),
            page.table(["cluster", "n real", "n generated", "n a side", *heads],
                       [[row["cluster"], *(row[name] for name in counts), *(said(row, f"FID_{side}") for side in sides)] for row in found],
                       f"FID to real patches of the cluster, {rows[0]['features']}, at equal n. Patches made for a cluster should lie "
                       "nearer to it than those made for others."),
            page.table(["cluster", *heads], [[row["cluster"], *(said(row, f"KID_{side}") for side in sides)] for row in found],
                       "The same by KID")]


def interval(row: dict[str, object], name: str) -> str:
    return page.with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"])


def patches_side_by_side(reference: ImageSet, generated: ImageSet, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Where the folders say what belongs together, one row a prompt or cluster, real patches first; else random rows of each."""
    groups = grouped(generated)
    if groups:
        real = {barcode: path for folder in reference.folders for barcode, path in patches_by_barcode(folder).items()}
        groups = [(label, [(key if key in real else key.rpartition("__")[2], path) for key, path in members]) for label, members in groups]
        shown = [groups[i] for i in np.sort(rng.choice(len(groups), min(ROWS, len(groups)), replace=False))]
        halves = [row_of_group(members, real) for _, members in shown]
        n_real, n_made = (max(len(side) for side in sides) for sides in zip(*halves, strict=True))
        cells = [[*map(read_patch, left), *[blank()] * (n_real - len(left)), *map(read_patch, right)] for left, right in halves]
        caption = (f"{len(shown)} of {len(groups)} prompts or clusters"
                   f"{', real patches first, then those generated from the genes of the same spots' if n_real else ''}.")
        return contact_sheet(cells, [label for label, _ in shown], ["real"] * n_real + ["generated"] * n_made, cell_px=CELL_PX), caption
    rows = [draw(reference, rng), draw(reference, rng), draw(generated, rng), draw(generated, rng)]
    return contact_sheet(rows, ["real", "real", "generated", "generated"], cell_px=CELL_PX), "Random patches of both sides."


def row_of_group(members: Sequence[tuple[str, Path]], real: dict[str, Path]) -> tuple[list[Path], list[Path]]:
    """Real and generated patches of one row: of a prompt its patch and what was made from it, of a cluster some spots of each."""
    first: dict[str, Path] = {}
    for barcode, path in members:
        first.setdefault(barcode, path)
    known = [barcode for barcode in first if barcode in real]
    if len(first) == 1 or not known:
        return [real[barcode] for barcode in known], [path for _, path in members[:COLUMNS]]
    spots = known[:COLUMNS // 2]
    return [real[barcode] for barcode in spots], [first[barcode] for barcode in spots]


def draw(images: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    return [read_patch(images.paths[i]) for i in rng.choice(len(images.paths), min(COLUMNS, len(images.paths)), replace=False)]


def blank() -> np.ndarray:
    return np.full((CELL_PX, CELL_PX, 3), 235, np.uint8)


def grouped(generated: ImageSet) -> list[tuple[str, list[tuple[str, Path]]]]:
    """(label, its (barcode, path)s) by cluster where `samples.csv` has one for all, else by prompt; barcodes as it has them."""
    chosen, groups = set(generated.paths), {}
    for folder in generated.folders:
        if not (folder / "samples.csv").is_file():
            return []
        rows = read_samples_csv(folder)
        by = "cluster" if all(row.get("cluster") for row in rows) else "prompt"
        for row in rows:
            if folder / row["file"] in chosen and row.get(by):
                groups.setdefault((str(folder), f"{by} {row[by]}"), []).append((row.get("barcode") or "", folder / row["file"]))
    return [(label, members) for (_, label), members in groups.items()]


def patches_by_barcode(folder: Path) -> dict[str, Path]:
    """By barcode and by SAMPLE__BARCODE, as slides share barcodes; empty for a folder that does not say which patch is whose."""
    if not (folder / "metadata.jsonl").is_file():
        return {}
    listed = read_patch_folder(folder)
    keys = listed.barcodes or []
    full = [f"{sample}__{barcode}" for sample, barcode in zip(listed.sample_ids, keys, strict=True)] if listed.sample_ids and keys else []
    return dict(zip(keys, listed.paths if keys else [], strict=True)) | dict(zip(full, listed.paths if full else [], strict=True))
