"""Row 27: a disk that takes no more, at many points of every command, and an output folder that cannot be written at all."""
import os

import anndata as ad
import pytest
from fault_runs import CommandServer
from output_contents import contents, differences, leftovers

from preprocessing.expression import write_vocabulary

pytestmark = pytest.mark.fault("full or read-only disk")
POINTS, KIB = 10, 1024


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A server of commands with a small disk of its own; `resize(bytes)` and `free()` work on it."""
    for unshare in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        try:
            server = CommandServer(*unshare)
            server.mount = tmp_path_factory.mktemp("disk")
            mounted = server.call("mount", "-t", "tmpfs", "-o", "size=64m", "none", server.mount) == 0
        except (OSError, ValueError):
            continue
        if mounted:
            yield server
            return server.close()
    pytest.skip("a small disk cannot be mounted here")


@pytest.fixture(autouse=True)
def empty_disk(disk):
    assert disk.call("mount", "-o", "remount,rw,size=64m", disk.mount) == 0
    assert disk.call("find", disk.mount, "-mindepth", "1", "-delete") == 0


def used(disk) -> int:
    about = os.statvfs(disk.path(disk.mount))
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def leave_free(disk, n_bytes: int) -> None:
    assert disk.call("mount", "-o", f"remount,size={(used(disk) + n_bytes) // KIB}k", disk.mount) == 0


def fills_up(disk, command, before, arguments, whole, steps, tried) -> None:
    """With an old output standing, run into a full disk at every step, a little further each time; then there is room."""
    out = disk.mount / "out"
    disk.call("mkdir", out)
    disk.succeeds(command, *before(out))
    old = contents(disk.path(out))
    assert differences(old, whole) != []
    n_full = 0
    for kib in steps:
        leave_free(disk, kib * KIB)
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
    leave_free(disk, 64 << 20)
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
    leave_free(disk, 300 * KIB)
    arguments = (*extraction(sample)(disk.mount / "out"), "--memory-gb", 0.0005)
    assert str(disk.mount) in disk.fails(4, "extract", *arguments)
    leave_free(disk, 64 << 20)
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
    assert disk.call("mount", "-o", "remount,ro", disk.mount) == 0
    run = disk.run(command, *arguments)
    assert run.code == 4 and len(run.errors) == 1 and str(out) in run.errors[0], (run.code, run.said)
    assert len(run.said.splitlines()) == 1, "no work was done before"
