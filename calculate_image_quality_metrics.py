"""Append FID and KID of generated patches, with intervals and the real-vs-real floor, to image_quality_metrics.csv."""
from __future__ import annotations

from math import isnan
from pathlib import Path

import click

from preprocessing.errors import Command, OptionError
from preprocessing.inputs import path_list
from preprocessing.progress import ProgressBar

MORE = ("gex", "judge", "null", "training", "patch_um", "judge_encoder_weights")     # options of what goes beyond distances


def calculate_image_quality(out_dir: Path, report: Path | None = None, progress: bool = True,
                            **settings) -> tuple[list[dict[str, object]], list[str]]:
    """Measure, append to the CSV in `out_dir`, write the page if one is asked for; returns the rows, and what else was found, in lines."""
    from evaluation import cluster_quality, features, image_quality, image_quality_page
    from preprocessing.older_outputs import json_file, page
    from preprocessing.output_places import require_outputs
    if report is not None and report.suffix.lower() == ".json":
        raise OptionError("--report", "the .html page; its numbers go into the .json of that name", str(report))
    require_outputs({"--out-dir": out_dir / image_quality.CSV_NAME,
                     "--report": {} if report is None else {
                         report: page("an older page of image quality", "Image quality"),
                         report.with_suffix(".json"): json_file("the numbers of an older page", "rows", "FID")}},
                    {f"--{name.replace('_', '-')}": settings.get(name) for name in ("gex", "judge", "judge_encoder_weights", "weights")})
    more = more_config(report, settings)
    chosen = features.feature_specs(settings.pop("features"), inception_weights=settings.pop("weights"))
    config = image_quality.QualityConfig(features=tuple(chosen), **settings)
    reference, generated = image_quality.collect_both(config)
    image_quality.read_rows(out_dir / image_quality.CSV_NAME)          # what is wrong is said before the long work
    if more is not None:
        from training.faithfulness_run import require_inputs, score_extra
        require_inputs(more)
    for line in image_quality.notices(config, reference, generated):
        ProgressBar.write(line)
    clusters = [] if report is None else cluster_quality.cluster_rows(
        (config.reference, reference.paths), (config.generated, generated.paths), None if more is None else more.gex)
    rows = list(image_quality.measure(config, reference, generated, progress, clusters))
    parts, numbers, lines = [], {}, []
    if more is not None:
        encoders = {spec.label: features.build_features(spec) for spec in chosen}
        found = score_extra(more, encoders, features.pick_device(config.device), progress)
        parts, numbers, lines = found.parts, found.numbers, found.lines
    if report is not None:
        image_quality_page.write_quality_report(report, config, reference, generated, rows, parts, numbers)
    image_quality.append_rows(out_dir / image_quality.CSV_NAME, rows)  # last: a call that failed leaves no row
    return rows, lines


def more_config(report: Path | None, settings: dict):
    """What is asked beyond distances, taken out of `settings`; None for nothing."""
    asked = {name: settings.pop(name) for name in MORE if name in settings}
    if not any(value not in (None, ()) for value in asked.values()):
        return None
    if report is None:
        raise OptionError("--gex, --train-img-path", "--report, the page and JSON that hold what they ask for", "none")
    from training.faithfulness_run import ReportConfig
    return ReportConfig(**{name: settings[name] for name in ("reference", "generated", "num", "batch_size", "seed")}, **asked)


def describe(row: dict[str, object]) -> str:
    """The row in one line."""
    name = "FID" if row["features"] == "inception" else f"Frechet distance on {row['features']}"
    return (f"{row['experiment']}: {name} {row['FID']:.4g} ({row['FID_low']:.4g} to {row['FID_high']:.4g}), "
            f"at n = {row['n_floor']:,}: {row['FID_at_floor_n']:.4g}, real vs real {row['FID_floor']:.4g}; "
            + ("" if isnan(row["FID_infinite"]) else f"at infinite n {row['FID_infinite']:.4g} ({row['FID_infinite_low']:.4g} to "
               f"{row['FID_infinite_high']:.4g}); ") +
            f"KID {row['KID_mean']:.4g} +- {row['KID_std']:.2g}, real vs real {row['KID_floor']:.2g}"
            + (f"  [{row['flags']}]" if row["flags"] else ""))


def folders(_context, parameter: click.Parameter, value: str) -> tuple[Path, ...]:
    """Folders separated by commas, each once; none only where the option may be left away."""
    found = tuple(path_list(value))
    if parameter.required and not found:
        raise click.BadParameter("expected a folder, or several separated by commas; found nothing")
    if len({folder.resolve() for folder in found}) < len(found):
        raise click.BadParameter(f"expected every folder once; found {value}")
    return found


@click.command(cls=Command)
@click.option("--experiment", required=True, help="Name of the row.")
@click.option("--ref-img-path", "reference", required=True, callback=folders, help="Folder(s) of real patches, separated by commas.")
@click.option("--gen-img-path", "generated", required=True, callback=folders, help="Folder(s) of generated patches, separated by commas.")
@click.option("--out-dir", type=click.Path(path_type=Path), default=".", help="Where image_quality_metrics.csv lies or will lie.")
@click.option("--features", default="inception",
              help="Encoders, separated by commas, one row each: inception (FID proper), efficientnet_lite0, uni, ..., each with "
                   "=WEIGHT_FILE where needed, e.g. timm:mobilenetv2_100=mobilenet.safetensors.")
@click.option("--weights", type=click.Path(path_type=Path), help="Inception weight file; default: torch hub cache, then the hub.")
@click.option("--num", type=int, help="Random number of images a side; default all.")
@click.option("--seed", type=click.IntRange(max=2**32 - 1), default=0, help="Seed of the choice of images, the KID subsets and the splits.")
@click.option("--batch-size", default=64, help="Images encoded at once.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Keep the reference's features here, by content.")
@click.option("--splits", "n_splits", type=click.IntRange(max=10_000), default=20, help="Random halves behind floors and intervals.")
@click.option("--match-px", type=click.IntRange(max=4096), help="Bring both sides to this side by area first. Default: as they are.")
@click.option("--report", type=click.Path(path_type=Path), help="Also write this HTML page, and the same as JSON beside it.")
@click.option("--gex", type=click.Path(path_type=Path), help="Report: expression of the reference's spots (.h5ad); with samples.csv in the "
              "generated folder: do patches follow their genes?")
@click.option("--judge", type=click.Path(path_type=Path), help="Report: weights of a second CLIP, trained on other spots or with another "
              "seed than the generator's, for retrieval.")
@click.option("--judge-encoder-weights", type=click.Path(path_type=Path), help="Weight file of the judge's image tower, if it has moved.")
@click.option("--null-img-path", "null", type=click.Path(path_type=Path), help="Report: patches of the null prompt, a second floor.")
@click.option("--train-img-path", "training", default="", callback=folders, help="Report: the generator's training patches: are generated "
              "ones copies? The reference must be held out.")
@click.option("--patch-um", type=click.FloatRange(max=10_000), help="Report: side of a patch, µm.  [default: as the .h5ad says, else 55]")
def main(**options):
    """Append one row a feature set to image_quality_metrics.csv: FID and KID of generated patches against real ones. Given twice in a
    row, a command writes its rows once.

    Example: python calculate_image_quality_metrics.py --experiment C4 --ref-img-path C4/patches --gen-img-path runs/C4
    --features efficientnet_lite0 --report runs/C4.html
    """
    rows, lines = calculate_image_quality(**options)
    for line in [*map(describe, rows), *lines]:
        click.echo(line)
    for path in filter(None, (options["out_dir"] / "image_quality_metrics.csv", options["report"])):
        click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
