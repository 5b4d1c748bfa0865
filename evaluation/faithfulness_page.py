"""Faithfulness and memorisation as parts of a page: what was measured between which floor and ceiling, and pictures to judge by."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evaluation import page
from evaluation.contact_sheet import contact_sheet
from evaluation.nuclei import SAID, NucleiSettings, outlined

NUMBERS = {"retrieval": "retrieval (R@10)", "readout": "expression read-out (Pearson)", "clusters": "cluster agreement (accuracy)",
           "nuclei": "nuclei and stain (Pearson)", "spatial": "spatial pattern (Moran's I)"}
SHOWN, CELL_PX = 8, 96


def faithfulness_parts(scores: Mapping[str, object], real: np.ndarray, generated: np.ndarray, tissue: np.ndarray | None) -> list[str]:
    """`real`, `generated` uint8 (n, px, px, 3) of the same spots, to show how nuclei were found; `tissue` the two maps, or None."""
    known = [name for name in NUMBERS if name in scores]
    sets = [name for name in ("generated", "shuffled", "null", "real") if any(name in scores[number] for number in known)]
    rows = [[NUMBERS[name], *(entry(scores[name].get(label)) for label in sets), scores[name]["share_of_ceiling"]] for name in known]
    heads = {"generated": "generated", "shuffled": "shuffled (floor)", "null": "null prompt", "real": "real (ceiling)"}
    nuclei = scores["nuclei"]
    by_name = [[SAID[statistic], nuclei["real"]["mean"][statistic], nuclei["generated"]["mean"][statistic],
                nuclei["generated"]["pearson"][statistic], *([scores["spatial"][side]["morans_i"][statistic] for side in
                                                             ("real", "generated")] if "spatial" in scores else [])]
               for statistic in nuclei["real"]["mean"]]
    moran = ["Moran's I, real", "Moran's I, generated"] if "spatial" in scores else []
    parts = [page.heading("Do they follow their genes?"),
             page.table(["", *(heads[label] for label in sets), "share of the way"], rows,
                        f"{scores['n_prompts']:,} spots, seeds: {scores['n_seeds']}; in brackets the 95 % interval over spots"),
             page.table(["per patch", "mean, real", "mean, generated", "Pearson", *moran], by_name, "Nuclei and stain")]
    if "clusters" in scores:
        parts.append(confusion(scores["clusters"]["generated"]["confusion"], scores["cluster_names"]))
    settings = NucleiSettings(scores["um_per_px"], scores["haematoxylin_threshold"])
    chosen = np.linspace(0, len(real) - 1, min(SHOWN, len(real))).astype(int)
    sheet = contact_sheet([[images[i] if plain else outlined(images[i], settings) for i in chosen]
                           for images in (real, generated) for plain in (True, False)],
                          ["real", "its nuclei", "generated", "its nuclei"], cell_px=CELL_PX)
    parts.append(page.picture(sheet, "Real and generated patches of the same spots, and the nuclei that were counted, in yellow."))
    if tissue is not None:
        parts.append(page.picture(tissue, "The section: real patches at their spots (left), generated ones (right)."))
    return parts


def entry(found: Mapping[str, object] | None) -> str | None:
    """`0.31 (0.25 to 0.37)`, without an interval where there is none."""
    if found is None:
        return None
    return page.with_interval(found["score"], *found["score_ci95"]) if "score_ci95" in found else page.number(found["score"])


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Rows: cluster whose genes were the prompt. Columns: cluster that the patches look like, in shares of the row."""
    rows = [[name, *(float(count / max(sum(row), 1)) for count in row)] for name, row in zip(names, counts, strict=True)]
    return page.table(["prompt's cluster", *names], rows, "Which cluster generated patches look like; shares of each row")


def memorisation_parts(summary: Mapping[str, object], pairs: np.ndarray) -> list[str]:
    """`pairs` is what `memorisation.closest_pairs` makes."""
    rows = [[name, page.with_interval(found["share_nearer"], *found["share_nearer_ci95"]), found["expected_share"],
             found["median_distance"], found["median_distance_held_out"]] for name, found in summary["encoders"].items()]
    n, copies = summary["n_generated"], summary["copies"]
    return [page.heading("Are they copies?"),
            page.paragraph(f"{copies:,} of {n:,} generated patches are copies of a training patch, as far as {len(rows)} "
                           f"encoder{'s' if len(rows) > 1 else ''} can tell, flips and quarter turns included; the same of "
                           f"{summary['copies_among_held_out']:,} of {summary['n_held_out']:,} held-out patches, which nobody copied."),
            page.table(["features", "share nearer than held-out's 5 %", "by chance", "median distance", "held-out"], rows,
                       f"Distance to the nearest of {summary['n_training']:,} training patches; 95 % intervals"),
            page.picture(pairs, "The nearest pairs, copies first: generated above, the nearest training patch below, turned to match. "
                         "Above: the distance over that to the next best training patch; a copy has less than "
                         f"{page.number(summary['copy_ratio'])} in every encoder.")]
