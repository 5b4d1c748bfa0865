"""The page over a cohort: how far each sample got, why one stopped, what is far from the others, and a page that loads nothing."""
import csv
import io
import re
from contextlib import redirect_stderr

import numpy as np
import pytest
import scipy.sparse as sp
from click.testing import CliRunner

from preprocessing.cohort_numbers import SampleNumbers, failure_reason, last_error, stain_rgb, warnings
from preprocessing.cohort_page import plain_ticks, write_cohort_page
from preprocessing.cohort_report import main
from preprocessing.errors import one_line_errors
from preprocessing.outputs import write_json
from preprocessing.stain import TARGET_VECTORS

TARGET = np.array(TARGET_VECTORS)


def _said_at_ctrl_c():
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit), one_line_errors():
        raise KeyboardInterrupt
    return said.getvalue()


INTERRUPTED = _said_at_ctrl_c()


@pytest.fixture
def cohort(tmp_path):
    """`cohort(ID=(steps, logs), ...)` makes the folders of a run and writes its page; returns (page text, rows of the CSV)."""
    def make(**samples):
        for sample_id, (steps, logs) in samples.items():
            for step, said in steps.items():
                _write(tmp_path / "out" / sample_id / "steps" / f"{step}.txt", said)
            for step, said in logs.items():
                _write(tmp_path / "out" / sample_id / "logs" / f"{step}.log", said)
        sheet = tmp_path / "sheet.csv"
        sheet.write_text("sample_id,wsi_file,space_ranger_dir\n" + "".join(f"{name},{name}.tif,{name}\n" for name in samples))
        done = CliRunner().invoke(main, ["--samples", str(sheet), "--out-dir", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        with open(tmp_path / "out" / "cohort.csv", newline="") as stream:
            return (tmp_path / "out" / "cohort.html").read_text(), {row["sample_id"]: row for row in csv.DictReader(stream)}
    return make


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _expression(path, counts):
    import anndata as ad

    adata = ad.AnnData(sp.csr_matrix(np.array(counts, dtype=np.float32)))
    adata.uns["morphology"] = {"mpp": 0.25}
    adata.uns["spatial"] = {"S": {"metadata": {"platform": "Visium HD"}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(path)


def test_medians_of_umis_and_genes_and_the_dropped_spots_are_counted(cohort, tmp_path):
    folder = tmp_path / "out" / "S"
    _expression(folder / "gex.h5ad", [[0, 0, 0], [3, 0, 0], [2, 2, 5], [0, 0, 0], [1, 1, 1]])
    _write(folder / "dropped_spots.tsv", "barcode\treason\nA\toff\nB\toff\n")
    write_json(folder / "patches" / "stain.json", {"normalised": True, "vectors": TARGET.tolist(), "maxima": [2, 1]})
    page, rows = cohort(S=(dict.fromkeys(("extract", "extracted", "genes"), "finished\n"), {}))
    row = rows["S"]
    assert (row["status"], row["spots_kept"], row["spots_dropped"], row["dropped_because"]) == ("finished", "5", "2", "2 off")
    assert (float(row["median_umis"]), float(row["median_genes"]), row["platform"], row["mpp"]) == (3, 1, "Visium HD", "0.25")
    assert float(row["eosin_g"]) == 0.8012
    assert f"background:rgb{stain_rgb(TARGET[:, 1])}" in page


def test_a_sample_whose_extraction_failed_shows_nothing_of_an_older_slide(cohort, tmp_path):
    folder = tmp_path / "out" / "S"
    _expression(folder / "gex.h5ad", [[1, 1, 1]])
    write_json(folder / "patches" / "stain.json", {"normalised": True, "vectors": TARGET.tolist(), "maxima": [2, 1]})
    page, rows = cohort(S=({"extract": "failed 3", "genes": "finished"}, {"extract": "error: broken\n"}))
    assert rows["S"]["spots_kept"] == rows["S"]["eosin_g"] == "" and 'class="swatch"' not in page


def test_library_sizes_are_right_whatever_the_slices(tmp_path, monkeypatch):
    import preprocessing.cohort_numbers as numbers

    counts = np.random.default_rng(0).poisson(0.4, (57, 30))
    _expression(tmp_path / "gex.h5ad", counts)
    monkeypatch.setattr(numbers, "ENTRIES_AT_ONCE", 7)           # fewer than many a row holds
    found = numbers._count_expression(tmp_path / "gex.h5ad")
    np.testing.assert_allclose(found["umis"], np.quantile(counts.sum(axis=1), numbers.QUANTILES))


@pytest.mark.parametrize(("steps", "logs", "status", "reason"), [
    ({"extract": "failed 3"}, {"extract": "cutting: 3%\rerror: S.tif: slide: expected a; found b\n"}, "failed",
     "patches and expression: S.tif: slide: expected a; found b"),
    ({"extract": "failed 137"}, {"extract": "cutting:  3%|"}, "failed",
     "patches and expression: killed from outside, most often for want of memory: raise memory_gb"),
    ({"extract": "failed 1"}, {"extract": "Traceback (most recent call last):\n  File x\nKeyError: 'a'\n"}, "failed",
     "patches and expression: stopped unexpectedly: KeyError: 'a'"),
    ({"extract": "failed 9"}, {"extract": ""}, "failed",
     "patches and expression: stopped without a word (exit code 9); see logs/extract.log"),
    ({}, {}, "not started", ""),
    ({}, {"extract": "cutting:  3%"}, "unfinished", "patches and expression: begun, not ended"),
    ({"extract": "finished"}, {"genes": "error: S.h5ad: genes: expected two; found one\n"}, "failed",
     "gene selection: S.h5ad: genes: expected two; found one"),
    ({"extract": "finished"}, {}, "unfinished", "gene selection: not begun"),
    ({"extract": "failed 130"}, {"extract": "cutting:  3%|"}, "unfinished", "patches and expression: interrupted"),
    ({}, {"extract": INTERRUPTED}, "unfinished", "patches and expression: interrupted"),
    ({"extract": "finished"}, {"genes": INTERRUPTED}, "unfinished", "gene selection: interrupted"),
    ({"extract": "finished"}, {"genes": "Traceback (most recent call last):\n  File x\nKeyboardInterrupt\n"}, "unfinished",
     "gene selection: interrupted"),
], ids=["bad input", "killed", "bug", "silent", "not started", "running", "genes", "waiting", "Ctrl-C by its code", "Ctrl-C by its line",
        "Ctrl-C in a later step", "Ctrl-C at the start"])
def test_the_page_says_how_far_a_sample_got_and_why_it_stopped(cohort, steps, logs, status, reason):
    page, rows = cohort(S=(steps, logs))
    assert (rows["S"]["status"], rows["S"]["reason"]) == (status, reason)
    assert ("<h2>Failed</h2>" in page) == (status == "failed")


def test_a_vocabulary_that_failed_is_the_reason_of_those_that_wait_for_it(cohort, tmp_path):
    _write(tmp_path / "out" / "logs" / "vocabulary.log", "error: no common gene\n")
    _, rows = cohort(S=({"extract": "finished"}, {}))
    assert (rows["S"]["status"], rows["S"]["reason"]) == ("failed", "gene vocabulary: no common gene")
    _write(tmp_path / "out" / "logs" / "vocabulary.log", INTERRUPTED)
    _, rows = cohort(S=({"extract": "finished"}, {}))
    assert (rows["S"]["status"], rows["S"]["reason"]) == ("unfinished", "gene selection: not begun")


def test_a_failure_cannot_write_markup_into_the_page(cohort):
    page, _ = cohort(S=({"extract": "failed 3"}, {"extract": "error: <script>alert(1)</script>\n"}))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_page_loads_nothing_and_links_only_beside_itself(tmp_path):
    numbers = {"platform": "Visium", "mpp": 0.5, "kept": 3, "umis": np.arange(101.0), "genes": np.arange(101.0)}
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "qc.html").write_text("")
    write_cohort_page(tmp_path / "cohort.html", [SampleNumbers("A", "finished", **numbers), SampleNumbers("B", "failed", "why")])
    page = (tmp_path / "cohort.html").read_text()
    assert set(re.findall(r"""href=["']([^"']+)""", page)) == {"cohort.csv", "A/qc.html"}
    sources = re.findall(r'src="([^"]{12})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import|<link|<script", page)


def _like(sample_id, umis=1000.0, mpp=0.5, stain=TARGET):
    return SampleNumbers(sample_id, "finished", umis=np.full(101, umis), genes=np.full(101, 10.0), mpp=mpp, kept=9, stain=stain)


@pytest.mark.parametrize(("odd", "said"), [
    ({"umis": 200.0}, "median UMIs 200, the others' median is 1,000"), ({"mpp": 1.0}, "mpp 1, the others' median is 0.5"),
    ({"stain": TARGET[:, ::-1]}, "haematoxylin 2"),
], ids=["umis", "mpp", "stain"])
def test_a_sample_far_from_the_others_is_named_and_the_others_are_not(odd, said):
    found = warnings([_like("A"), _like("B", umis=1300.0), _like("C", mpp=0.45), _like("ODD", **odd)])
    assert found["ODD"][0].startswith(said)
    assert not (found["A"] or found["B"] or found["C"])


def test_two_samples_are_too_few_to_call_one_odd():
    assert not any(warnings([_like("A"), _like("B", umis=1.0)]).values())


def test_the_last_error_of_a_log_counts_and_notices_do_not(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("notice: error: not one\nerror: first\nsaid\nerror: last\nwrote nothing\n")
    assert last_error(log) == "last"
    log.write_text("all is well\n")
    assert last_error(log) == ""
    assert failure_reason(tmp_path / "absent.log", "1") == "stopped without a word (exit code 1); see logs/absent.log"


@pytest.mark.parametrize(("folder", "title"), [("kidney", "Cohort kidney"), ("cohort", "Cohort"), ("Cohort", "Cohort")])
def test_the_page_is_named_after_its_folder_once(tmp_path, folder, title):
    (tmp_path / folder).mkdir()
    write_cohort_page(tmp_path / folder / "cohort.html", [SampleNumbers("A", "not started")])
    page = (tmp_path / folder / "cohort.html").read_text()
    assert f"<title>{title}</title>" in page and f"<h1>{title}</h1>" in page


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0.8, 13, [1, 2, 5, 10]), (30, 450, [50, 100, 200]), (900, 21_000, [1000, 2000, 5000, 10_000, 20_000]),
    (0.5, 2e5, 10.0 ** np.arange(6)),
])
def test_a_logarithmic_axis_has_plain_ticks(low, high, ticks):
    np.testing.assert_allclose(plain_ticks(low, high), ticks)
