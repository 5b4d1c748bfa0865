"""Write the page over a cohort: `cohort.html` and `cohort.csv`, from whatever of it is finished.

The workflow writes it at the end of every run, and so does this command, during a run too.
"""
from __future__ import annotations

from pathlib import Path

import click

from preprocessing.errors import Command


def report_cohort(samples: Path, out_dir: Path) -> str:
    """Write both files; returns what was found in a line, and in one more for every sample that failed."""
    from preprocessing.cohort import read_cohort_sheet
    from preprocessing.cohort_numbers import gather, write_table
    from preprocessing.cohort_page import summary_line, write_cohort_page
    from preprocessing.older_outputs import page as page_of
    from preprocessing.older_outputs import table as table_of
    from preprocessing.output_places import require_outputs, require_shared_folder
    from preprocessing.outputs import finished_together, locked

    table, page = out_dir / "cohort.csv", out_dir / "cohort.html"
    require_shared_folder("--out-dir", out_dir)
    kinds = {table: table_of("an older table of the cohort", "sample_id,status,.*"), page: page_of("an older page of the cohort", "Cohort")}
    require_outputs({"--out-dir": kinds}, {"--samples": samples})
    cohort = gather(out_dir, read_cohort_sheet(samples))
    with locked(table, covers=[page]), finished_together([table, page]) as staged:
        write_table(staged[table], cohort)
        write_cohort_page(staged[page], cohort)
    failed = [f"{sample.sample_id}: {sample.reason}" for sample in cohort if sample.status == "failed"]
    return "\n".join([summary_line(cohort), *failed])


PATH = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--samples", type=PATH, required=True, help="Sample sheet of the cohort.")
@click.option("--out-dir", type=PATH, required=True, help="Folder of the cohort, as the workflow was told.")
def main(samples, out_dir):
    """Write cohort.html and cohort.csv: every sample's spots, UMIs, genes, mpp and stain, and why one failed.

    Example: python preprocessing/cohort_report.py --samples sheet.csv --out-dir cohort
    """
    click.echo(report_cohort(samples, out_dir))
    click.echo(f"wrote {out_dir / 'cohort.html'}, {out_dir / 'cohort.csv'}")


if __name__ == "__main__":
    main()
