"""Row 27: a disk that takes no more, at many points of every command, and an output folder that cannot be written at all."""
import anndata as ad
import pytest
from output_contents import contents, differences, leftovers
from small_disk import KIB, MIB, small_disk

from preprocessing.expression import write_vocabulary

pytestmark = pytest.mark.fault("full or read-only disk")
POINTS = 10


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    server = small_disk(tmp_path_factory.mktemp("disk"))
    if server is None:
        pytest.skip("a small disk cannot be mounted here")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def empty_disk(disk):
    disk.make_empty()


def fills_up(disk, command, before, arguments, whole, steps, tried) -> None:
    """With an old output standing, run into a full disk at every step, a little further each time; then there is room."""
    out = disk.mount / "out"
    disk.call("mkdir", out)
    disk.succeeds(command, *before(out))
    old = contents(disk.path(out))
    assert differences(old, whole) != []
    n_full = 0
    for kib in steps:
        disk.leave_free(kib * KIB)
        run = disk.run(command, *arguments(out))
        if run.code == 0:
            break
        assert run.code == 4 and len(run.errors) == 1, (kib, run.code, run.said)
        assert "No space left on device" in run.errors[0] or " are free" in run.errors[0]
        assert str(disk.mount) in run.errors[0], "the file is named"
        found = contents(disk.path(out))
        assert {name: found.get(name) for name in old} == old, f"old outputs at {kib} KiB"
        assert found.keys() == old.keys(), "nothing new under a final name"
        n_full += 1
        tried()
    assert n_full >= POINTS
    disk.leave_free(64 * MIB)
    disk.succeeds(command, *arguments(out))
    assert differences(contents(disk.path(out)), whole) == [] and leftovers(disk.path(out)) == []


def extraction(sample, *options):
    return lambda out: ("--space-ranger-dir", sample.space_ranger_dir, "--wsi-file", sample.slide, "--out-dir", out, "--dump-dir",
                        out / "patches", "--patch-sz-px", 32, "--workers", 2, *options)


@pytest.mark.slow
def test_an_extraction_on_a_full_disk_leaves_the_old_outputs_together_and_goes_on_with_room(disk, sample, tmp_path, tried):
    arguments = extraction(sample)
    disk.succeeds("extract", *arguments(tmp_path))
    steps = [0, 4, 300, 1200, 1800, 1800, 1200, 1500, 2500, 3500, 4200, 5000]
    fills_up(disk, "extract", extraction(sample, "--stride", 9), arguments, contents(tmp_path), steps, tried)


def test_sums_that_wait_on_a_full_disk_end_as_one_line(disk, sample):
    """Counts beyond the budget go to a temporary file beside the output."""
    disk.leave_free(300 * KIB)
    arguments = (*extraction(sample)(disk.mount / "out"), "--memory-gb", 0.0005)
    assert str(disk.mount) in disk.fails(4, "extract", *arguments)
    disk.leave_free(64 * MIB)
    disk.succeeds("extract", *arguments)
    assert leftovers(disk.path(disk.mount / "out")) == []


@pytest.fixture(scope="module")
def extracted(disk, sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted")
    disk.succeeds("extract", *extraction(sample)(out))
    genes = ad.read_h5ad(out / "gex.h5ad", backed="r").var_names.tolist()
    write_vocabulary(out / "vocab.txt", genes[50:3:-1])
    write_vocabulary(out / "other.txt", genes[:9])
    return out


@pytest.mark.slow
def test_a_gene_filter_on_a_full_disk_leaves_the_old_file_and_goes_on_with_room(disk, extracted, tmp_path, tried):
    def arguments(out, vocabulary="vocab.txt"):
        return "--raw-file", extracted / "gex.h5ad", "--vocab-file", extracted / vocabulary, "--out-file", out / "gex_filt.h5ad"

    disk.succeeds("filter", *arguments(tmp_path))
    steps = [0, 4, 100, 400, 600, 700, 700, 500, 500, 550, 600, 700, 800]
    fills_up(disk, "filter", lambda out: arguments(out, "other.txt"), arguments, contents(tmp_path), steps, tried)


@pytest.mark.slow
def test_a_dump_on_a_full_disk_leaves_the_old_folder_and_goes_on_with_room(disk, sample, extracted, tmp_path, tried):
    def arguments(out, *options):
        return "--images", extracted / "imgs.h5", "--wsi", sample.slide, "--out-dir", out / "patches", *options

    disk.succeeds("dump", *arguments(tmp_path))
    steps = [0, 4, 300, 900, 610, 460, 300, 220, 140, 60, 57, 20, 40, 60, 60]
    fills_up(disk, "dump", lambda out: arguments(out, "--no-normalize"), arguments, contents(tmp_path), steps, tried)


# ---- a folder that cannot be written --------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["extract", "filter", "dump"])
def test_a_read_only_output_is_refused_at_the_start(disk, sample, extracted, command):
    out = disk.mount / "out"
    disk.call("mkdir", out)
    arguments = {"extract": extraction(sample)(out),
                 "filter": ("--raw-file", extracted / "gex.h5ad", "--vocab-file", extracted / "vocab.txt", "--out-file", out / "g.h5ad"),
                 "dump": ("--images", extracted / "imgs.h5", "--wsi", sample.slide, "--out-dir", out / "patches")}[command]
    disk.make_read_only()
    run = disk.run(command, *arguments)
    assert run.code == 4 and len(run.errors) == 1 and str(out) in run.errors[0], (run.code, run.said)
    assert len(run.said.splitlines()) == 1, "no work was done before"
