"""The page of `evaluate_sections.py --report`: what held-out sections say, in sentences, tables and patches."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from evaluation import page
from evaluation.contact_sheet import contact_sheet, save_png
from evaluation.features import resize_by_area
from evaluation.sections import Generated, Section

ROWS, SEEDS, CELL_PX = 10, 6, 96


def contact_sheet_files(path: Path, sheets: Mapping[str, np.ndarray | None]) -> dict[str, Path]:
    """Section -> contact_sheet_<section>.png beside the page, of those that have generated patches."""
    return {name: path.with_name(f"contact_sheet_{name}.png") for name, sheet in sheets.items() if sheet is not None}


def write_sections_page(path: Path, results: Mapping, sheets: Mapping[str, np.ndarray | None],
                        staged: Mapping[Path, Path]) -> None:
    """Write the page, and the contact sheets beside it, under their `staged` names (`finished_together`).

    `sheets` holds the `section_sheet` of each section, where there are generated patches.
    """
    pictures = contact_sheet_files(path, sheets)
    parts = [page.paragraph(f"Trained on {', '.join(results['train'])}. None of these is among the sections shown.",
                            "lead")]
    for name, scores in results["sections"].items():
        sheet = sheets.get(name)
        if sheet is not None:
            save_png(staged[pictures[name]], sheet)
        parts += section_parts(name, scores, sheet)
    parts += [page.heading("Wall time"), page.table(["step", "seconds"], list(results["wall_time_s"].items()), "Seconds by step"),
              page.heading("Weights and versions"),
              page.facts({"weights of " + name: digest for name, digest in results["weights_sha256"].items() if digest}),
              page.facts(results["versions"])]
    page.write_page(staged[path], page.page(f"Held-out sections: {', '.join(results['sections'])}", parts))


def section_parts(name: str, scores: Mapping, sheet: np.ndarray | None) -> list[str]:
    """One section: sentences, tables, contact sheet."""
    parts = [page.heading(f"Section {name}: {scores['n_spots']:,} spots"), page.paragraph(retrieval_sentence(scores)),
             retrieval_table(scores)]
    if sheet is None:
        return [*parts, page.paragraph("No generated patches were given, so only retrieval was measured.", "note")]
    parts += [page.paragraph(sentence) for sentence in generation_sentences(scores)]
    if "paired" in scores:
        parts.append(paired_table(scores["paired"]))
    parts += [distance_table(scores), page.picture(sheet,
              f"{name}: the real patch of a spot at {scores['generated_px']} px, then patches generated from its genes, one a seed.")]
    return parts


def retrieval_sentence(scores: Mapping) -> str:
    """Is the CLIP above chance, and does it beat the linear baseline? Said only as far as the interval carries."""
    clip, linear = scores["retrieval"]["gene_to_image"], scores["baseline_linear"]["gene_to_image"]
    low, high = clip["r10_ci95"]
    chance = clip["chance_r10"]
    above = ("above chance" if low > chance else "not told apart from chance") + f" ({chance:.3f})"
    apart = scores["r10_above_baseline"]["gene_to_image"]
    span = f"difference {apart['mean']:+.3f}, 95 % {apart['ci95'][0]:+.3f} to {apart['ci95'][1]:+.3f} over the same spots"
    if apart["ci95"][0] > 0:
        verdict = f"beats the linear baseline: {span}"
    elif apart["ci95"][1] < 0:
        verdict = f"falls short of the linear baseline: {span}"
    else:
        side = {1: "higher than", 0: "equal to", -1: "lower than"}[int(np.sign(apart["mean"]))]
        verdict = f"is {side} the linear baseline, but this section cannot decide between them: {span}"
    return (f"From its genes, the CLIP finds a spot's own patch among the first 10 of {scores['n_spots']:,} with R@10 {clip['r10']:.3f} "
            f"(95 % {low:.3f} to {high:.3f}), {above}. It {verdict} (baseline {linear['r10']:.3f}).")


def generation_sentences(scores: Mapping) -> list[str]:
    """Quality, faithfulness, diversity: one sentence each."""
    sentences = []
    for label, values in scores["frechet"].items():
        made, floor = values["generated"]["mean"], values["real_vs_real"]["mean"]
        text = f"In {label} features the generated patches lie {made / floor:.1f} times as far from real ones as real ones from each other"
        if "untrained" in values:
            raw = values["untrained"]["mean"]
            text += f"; the untrained generator lies {raw / floor:.1f} times as far"
            text += "" if made < raw else ", so training has not helped"
        sentences.append(f"{text} (Frechet distance, n = {values['n']}).")
    if "paired" in scores:
        own, shuffled = scores["paired"]["own_genes"], scores["paired"]["shuffled_genes"]
        follows = own["r10_ci95"][0] > max(shuffled["r10"], own["chance_r10"])
        verb = "follow" if follows else "do not measurably follow"
        sentences.append(f"Judged by a second CLIP, the generated patches {verb} their genes: "
                         f"R@10 {own['r10']:.3f} with their own, {shuffled['r10']:.3f} with another spot's.")
    diversity = scores["within_prompt_diversity"]
    if diversity["generated"] is not None and diversity["real"] > 0:
        by_z = diversity.get("generated_z")
        share = (diversity["generated"] if by_z is None else by_z) / diversity["real"]
        alone = "" if by_z is None else f" ({by_z:.1f} by z alone, with the per-pixel noise held)"
        sentences.append(f"Patches of one prompt differ by {diversity['generated']:.1f} grey levels from seed to seed{alone}; real patches "
                         f"of one {diversity['real_groups']} by {diversity['real']:.1f}"
                         + (". That is a collapsed generator: it hardly listens to its noise." if share < 0.25 else "."))
    return sentences


def retrieval_table(scores: Mapping) -> str:
    rows = [retrieval_row(f"{model}, {way.replace('_', ' ')}", found)
            for model, key in (("CLIP", "retrieval"), ("linear", "baseline_linear")) for way, found in scores[key].items()]
    chance = scores["retrieval"]["gene_to_image"]["chance_r10"]
    return page.table(["retrieval", "R@1", "R@5", "R@10", "median rank"], rows,
                      f"Retrieval among {scores['n_spots']:,} spots; chance R@10 {chance:.3f}")


def paired_table(paired: Mapping) -> str:
    names = {"real_patches": "real patches (ceiling)", "own_genes": "generated, own genes", "shuffled_genes": "generated, shuffled genes"}
    return page.table(["judged by a second CLIP", "R@1", "R@5", "R@10", "median rank"],
                      [retrieval_row(label, paired[name]) for name, label in names.items()],
                      f"Genes to generated patches, {paired['n_prompts']:,} prompts, {paired['n_seeds']} seeds")


def retrieval_row(label: str, found: Mapping) -> list[object]:
    low, high = found["r10_ci95"]
    return [label, f"{found['r1']:.3f}", f"{found['r5']:.3f}", f"{found['r10']:.3f} ({low:.3f} to {high:.3f})", found["median_rank"]]


def distance_table(scores: Mapping) -> str:
    columns = ("generated", "real_vs_real", "untrained")
    rows = [[f"{kind}, {label}", *(page.with_interval(values[name]["mean"], *values[name]["ci95"]) if name in values else "-"
                                  for name in columns)]
            for kind, key in (("Frechet", "frechet"), ("KID", "kid")) for label, values in scores[key].items()]
    n = next(iter(scores["frechet"].values()))["n"]
    return page.table(["distance", "generated", "real vs real (floor)", "untrained"], rows,
                      f"Distance to a random half of the real patches, n = {n} a side; 95 % of the splits in brackets")


def section_sheet(section: Section, generated: Generated, rng: np.random.Generator) -> np.ndarray:
    """Some spots, a row each: real patch, then the generated ones."""
    chosen = np.sort(rng.choice(len(generated.rows), min(ROWS, len(generated.rows)), replace=False))
    real = resize_by_area(section.images[generated.rows[chosen]], generated.px)
    rows = [[patch, *generated.images[i, :SEEDS]] for patch, i in zip(real, chosen, strict=True)]
    named = np.full(len(section.barcodes), "") if section.clusters is None else section.clusters
    labels = [f"{section.barcodes[row]}, cluster {named[row]}" if named[row] else section.barcodes[row] for row in generated.rows[chosen]]
    return contact_sheet(rows, labels, ["real", *(f"seed {seed}" for seed in generated.seeds[:SEEDS])], cell_px=CELL_PX)
