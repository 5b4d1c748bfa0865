"""Score held-out sections of real tissue from the files that the other commands wrote: results.json and a page."""
from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import click
import numpy as np

from preprocessing.errors import Command, InputError, OptionError
from preprocessing.inputs import path_list, read_text


def evaluate_sections(*, train: str, val: str, network: Path, judge: Path | None, generated: str | None, untrained: str | None,
                      noise_held: str | None, features: str, steps: Path | None, out: Path, report: Path | None,
                      encoder_weights: Path | None = None, judge_encoder_weights: Path | None = None, seed: int = 0, batch_size: int = 32,
                      device: str = "auto", progress: bool = True) -> dict:
    """Score every validation section; writes and returns the results."""
    from evaluation.features import build_features, feature_specs, pick_device
    from evaluation.sections import FeatureBank
    from evaluation.sections_page import contact_sheet_files, write_sections_page
    from networks.clip import CLIP, clip_weights_sha256
    from networks.histo_models import build_encoder
    from preprocessing.done_manifests import program_versions
    from preprocessing.older_outputs import json_file, page
    from preprocessing.output_places import require_outputs
    from preprocessing.outputs import finished_together, locked, write_json
    started, steps_before = time.monotonic(), read_steps(steps)
    for option, value in (("--judge", judge), ("--untrained", untrained), ("--noise-held", noise_held)):
        if value is not None and generated is None:
            raise OptionError(option, "--generated beside it, the patches that it is about", "none")
    train_files, val_files = section_files(train, "train"), section_files(val, "val")
    require_outputs({"--out": {out: json_file("older results", "sections")},
                     "--report": {} if report is None else {report: page("an older page of sections", "Held-out sections")}}, {
        "--train": [train, *(path for files in train_files for path in (files.gex, files.images))],
        "--val": [val, *(path for files in val_files for path in (files.gex, files.images))],
        "--network": network, "--judge": judge, "--steps": steps, "--encoder-weights": encoder_weights})
    folders = {name: listed(text, val_files, f"--{name.replace('_', '-')}")
               for name, text in (("generated", generated), ("untrained", untrained), ("noise_held", noise_held))}
    require_apart(train_files, val_files)
    specs = feature_specs(features)
    device = pick_device(device)
    clip = CLIP.from_pretrained(network, image_encoder_weights=encoder_weights).to(device)
    second = CLIP.from_pretrained(judge, image_encoder_weights=judge_encoder_weights).to(device) if judge else None
    hashes = {"network": clip_weights_sha256(network), "judge": clip_weights_sha256(judge) if judge else None}
    if hashes["judge"] == hashes["network"]:
        raise OptionError("--judge", "another CLIP than --network: a model cannot judge what was made with it", str(judge))
    tower = build_encoder(clip.config.image_encoder, encoder_weights or clip.config.image_encoder_weights)   # at its own side
    baseline = fit_baseline(train_files, clip, tower, FeatureBank(batch_size, device, progress), seed)
    encoders = {spec.label: build_features(spec) for spec in specs} if generated else {}
    sections, sheets = {}, {}
    for number, files in enumerate(val_files):
        chosen = {name: paths[number] if paths else None for name, paths in folders.items()}
        bank = FeatureBank(batch_size, device, progress)          # of this section's patches alone: memory is that of one section
        sections[files.sample_id], sheets[files.sample_id] = score_section(files, clip, second, (baseline, tower), encoders, bank, chosen,
                                                                              seed)
    results = {"sections": sections, "wall_time_s": {**steps_before, "evaluate sections": round(time.monotonic() - started, 1)},
               "train": [files.sample_id for files in train_files], "ridge_strength": baseline.strength, "seed": seed,
               "weights_sha256": {**hashes, **{label: encoder.source for label, encoder in encoders.items()}},
               "versions": program_versions()}
    pages = [] if report is None else [report, *contact_sheet_files(report, sheets).values()]
    with locked(out, covers=pages), finished_together([out, *pages]) as staged:
        write_json(staged[out], results)
        if report is not None:
            write_sections_page(report, results, sheets, staged)
    return results


def section_files(text: str, split: str):
    """A sample sheet (its rows of this split, or all if the sheet has one split only), or folders with patches/ and gex_filt.h5ad."""
    from training.sample_sheet import SampleFiles, read_sample_sheet, sample_files
    if text.endswith(".csv"):
        samples = read_sample_sheet(text)
        chosen = samples if len({sample.split for sample in samples}) == 1 else [sample for sample in samples if sample.split == split]
        if not chosen:
            raise InputError(text, "split", f"rows of {split}", "none")
        return chosen
    folders = path_list(text)
    images = [folder / "patches" if (folder / "patches").is_dir() else folder / "imgs.h5" for folder in folders]
    for folder, patches in zip(folders, images, strict=True):
        if not patches.exists() or not (folder / "gex_filt.h5ad").is_file():
            raise InputError(folder, "section", "patches/ (or imgs.h5) and gex_filt.h5ad",
                             "one of them missing" if folder.is_dir() else "no folder")
    named = sample_files(images, [folder / "gex_filt.h5ad" for folder in folders])
    return [SampleFiles(sample.sample_id, sample.images, sample.gex, split) for sample in named]


def listed(text: str | None, val_files, option: str) -> list[Path] | None:
    """Comma-separated generated folders, one a validation section, in their order; looked into before any work starts."""
    from evaluation.features import read_samples_csv
    if text is None:
        return None
    folders = path_list(text)
    if len(folders) != len(val_files):
        raise OptionError(option, f"one folder for each of the {len(val_files)} validation sections, in their order", str(len(folders)))
    for folder in folders:
        read_samples_csv(folder)
    return folders


def require_apart(train_files, val_files) -> None:
    """A held-out section is none of the training sections, neither by name nor by file."""
    names, paths = {files.sample_id for files in train_files}, {files.gex.resolve() for files in train_files}
    shared = [files.sample_id for files in val_files if files.sample_id in names or files.gex.resolve() in paths]
    if shared:
        raise OptionError("--val", "sections that --train does not name", ", ".join(shared))


def load_section(files, clip, judge, progress: bool):
    """The arrays of one validation section, normalised once for each of the two models."""
    from evaluation.sections import Section, named_clusters
    from training.data import ImageGeneDataset, expression_only
    data = ImageGeneDataset([files], target_sum=clip.target_sum, vocabulary=clip.gene_names)
    judged = expression_only([files], target_sum=judge.target_sum, vocabulary=judge.gene_names).expression if judge else data.expression
    images = data.load_images(progress=progress).permute(0, 2, 3, 1).numpy()
    return Section(files.sample_id, [barcode.removeprefix(f"{files.sample_id}__") for barcode in data.barcodes], images, data.expression,
                   judged, named_clusters(data.obs))


def fit_baseline(train_files, clip, tower, bank, seed: int):
    """The linear baseline on the training sections, in the features of the CLIP's image tower at the tower's own side."""
    from evaluation.linear_baseline import fit_linear_baseline
    from training.data import ImageGeneDataset
    data = ImageGeneDataset(train_files, target_sum=clip.target_sum, vocabulary=clip.gene_names)
    images = data.load_images(progress=bank.progress).permute(0, 2, 3, 1).numpy()
    features = bank.features("training", images, tower)
    return fit_linear_baseline(data.expression, features, data.sample_ids, rng=np.random.default_rng(seed))


def score_section(files, clip, judge, baseline, encoders, bank, folders: dict[str, Path | None], seed: int):
    """Every score that the given files allow, and the page's contact sheet, where there are generated patches."""
    from evaluation import sections
    from evaluation.sections_page import section_sheet
    section = load_section(files, clip, judge, bank.progress)
    scores = {"n_spots": len(section.barcodes), **sections.score_retrieval(section, clip, *baseline, bank, seed)}
    if folders["generated"] is None:
        return scores, None
    made = sections.read_generated(folders["generated"], section.sample_id, section.barcodes)
    raw, held = (sections.read_generated(folders[name], section.sample_id, section.barcodes) if folders[name] else None
                 for name in ("untrained", "noise_held"))
    if raw is not None and raw.px != made.px:
        raise InputError(folders["untrained"], "size", f"{made.px} px, as the generated patches", f"{raw.px} px")
    scores |= sections.score_distances(section, made, raw, encoders, bank, seed)
    if judge is not None:
        scores["paired"] = sections.score_faithfulness(section, made, judge, bank, seed)
    return scores | {"within_prompt_diversity": sections.score_diversity(section, made, held), "generated_px": made.px}, section_sheet(
        section, made, np.random.default_rng(seed))


def read_steps(path: Path | None) -> dict[str, float]:
    """Wall times by step from JSON lines or a CSV with step and seconds; times of the same step are added."""
    if path is None:
        return {}
    text = read_text(path, "rows of step and seconds")
    try:
        rows = ([json.loads(line) for line in text.splitlines() if line.strip()] if text.lstrip().startswith("{")
                else list(csv.DictReader(text.splitlines())))
        total: dict[str, float] = {}
        for row in rows:
            total[row["step"]] = round(total.get(row["step"], 0) + float(row["seconds"]), 1)
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, csv.Error) as error:
        raise InputError(path, "steps", "rows of step and seconds", str(error)) from error
    return total


@click.command(cls=Command)
@click.option("--train", required=True, help="Training sections: a sample sheet (.csv) or folders with patches/ and gex_filt.h5ad.")
@click.option("--val", required=True, help="Held-out sections, in the same form.")
@click.option("--network", type=click.Path(path_type=Path), required=True, help="CLIP weights folder.")
@click.option("--judge", type=click.Path(path_type=Path), help="Weights folder of a second CLIP, of another seed or image tower.")
@click.option("--generated", help="Generated folder of each held-out section, separated by commas, in their order.")
@click.option("--untrained", help="The same from the snapshot at 0 kimg.")
@click.option("--noise-held", help="The same prompts and seeds made with --noise-mode const: what z alone changes.")
@click.option("--features", default="efficientnet_lite0", help="Feature sets of the distances: NAME or NAME=WEIGHT_FILE, by commas.")
@click.option("--encoder-weights", type=click.Path(path_type=Path), help="Weight file of the CLIP's image tower, if it has moved.")
@click.option("--judge-encoder-weights", type=click.Path(path_type=Path), help="The same for the judge.")
@click.option("--steps", type=click.Path(path_type=Path), help="Wall times so far: JSON lines or CSV of step, seconds.")
@click.option("--out", type=click.Path(path_type=Path), default="results.json", help="Results file to write.")
@click.option("--report", type=click.Path(path_type=Path), help="Also write this HTML page.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of splits, shuffles, bootstraps.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Images encoded at once.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
def main(**options):
    """Score held-out sections: does the CLIP find the patch of a spot, do generated patches look real, do they follow the genes?

    Example: python evaluate_sections.py --train run/C2,run/C3 --val run/C4 --network run/clip --judge run/judge
    --generated run/gen_C4 --untrained run/untrained_C4 --out run/results.json --report run/index.html
    """
    results = evaluate_sections(**options)
    for name, scores in results["sections"].items():
        found, linear = scores["retrieval"]["gene_to_image"], scores["baseline_linear"]["gene_to_image"]
        click.echo(f"{name}: {scores['n_spots']:,} spots, gene to image R@10 {found['r10']:.3f} ({found['r10_ci95'][0]:.3f} to "
                   f"{found['r10_ci95'][1]:.3f}), linear baseline {linear['r10']:.3f}, chance {found['chance_r10']:.3f}")
    for path in filter(None, (options["out"], options["report"])):
        click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
