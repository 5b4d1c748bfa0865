"""A new run from another's weights: what fits is taken, what does not is listed, and the same resolution goes on exactly."""
from dataclasses import replace

import pytest
import torch
from gan_runs import TINY, make_run, tiny_data
from test_gan_modes import make_run as make_mode_run

from networks.snapshot import save_snapshot
from preprocessing.errors import InputError, OptionError, WeightsError
from training.checkpoints import Checkpoint, latest_checkpoint
from training.gan_config import resolve
from training.gan_data import gan_data
from training.warm_start import Weights, find_start, start_from


def config(**said):
    return resolve("best", "custom", **{**TINY, **said})


def trained(folder, steps=2, **said):
    run = make_run(folder, **said)
    for _ in range(steps):
        run.one_step()
    run.save()
    return run


def larger_data():
    small = tiny_data().training
    images = torch.nn.functional.interpolate(small.images, scale_factor=2)
    return gan_data("TINY", replace(small, images=images), tiny_data().barcodes)


def test_a_larger_run_takes_the_lower_blocks_and_lists_what_is_new_and_what_has_no_place(tmp_path):
    small = trained(tmp_path / "small")
    start = find_start(tmp_path, "x", str(tmp_path / "small"), config(img_resolution=32))
    assert isinstance(start, Weights) and start.img_resolution == 16
    run = make_run(tmp_path / "large", data=larger_data(), img_resolution=32)
    fresh = run.gan.generator.state_dict()["blocks.2.convs.0.weight"].clone()
    report = start_from(run, start)
    own, theirs = run.gan.generator.state_dict(), small.gan.generator.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs) and torch.equal(own["blocks.2.convs.0.weight"], fresh)
    assert all(torch.equal(a, b) for a, b in zip(run.average.state_dict().values(), own.values(), strict=True))
    assert report[0] == f"generator: {len(theirs)} of {len(own)} tensors taken"
    listed = report[1].removeprefix("generator: new here: ").split(", ")
    assert sorted(listed) == sorted(own.keys() - theirs.keys()) and all(name.startswith("blocks.2.") for name in listed)
    heads = run.gan.discriminator.state_dict()
    assert torch.equal(heads["heads.0.prompt.weight"], small.gan.discriminator.state_dict()["heads.0.prompt.weight"])
    assert run.progress.step == 0 and not run.gan.g_optimiser.state
    run.one_step()


def test_shapes_that_differ_start_anew_and_are_listed_from_both_sides(tmp_path):
    trained(tmp_path / "small")
    run = make_run(tmp_path / "wide", cmax=4)
    report = start_from(run, replace(find_start(tmp_path, "x", str(tmp_path / "small"), config(img_resolution=32)), img_resolution=16))
    text = "\n".join(report)
    assert "generator: new here: " in text and "generator: without a place here: " in text and "blocks.0.convs.0.weight" in report[1]
    assert torch.equal(run.gan.generator.mapping_network.fc0.weight, run.average.mapping_network.fc0.weight)


def test_a_snapshot_starts_a_new_run_at_its_own_size_with_a_fresh_discriminator(tmp_path):
    old = trained(tmp_path / "old")
    save_snapshot(tmp_path / "snapshot", old.average)
    start = find_start(tmp_path, "x", str(tmp_path / "snapshot"), config())
    run, plain = make_run(tmp_path / "new"), make_run(tmp_path / "plain")
    report = start_from(run, start, resume_kimg=0.016)
    assert all(torch.equal(a, b) for a, b in zip(run.gan.generator.state_dict().values(), old.average.state_dict().values(), strict=True))
    assert report[1:] == ["discriminator: starts anew"]
    assert torch.equal(run.gan.discriminator.heads[0].conv_in.weight, plain.gan.discriminator.heads[0].conv_in.weight)
    assert run.progress.step == 2 and run.kimg == 0.016


def test_the_clock_may_start_later_and_the_run_ends_at_its_kimg_with_a_first_snapshot(tmp_path):
    old = trained(tmp_path / "old")
    save_snapshot(tmp_path / "snapshot", old.average)
    run = make_run(tmp_path / "new")
    start_from(run, find_start(tmp_path, "x", str(tmp_path / "snapshot"), config()), resume_kimg=0.048)
    assert sum(1 for _ in run.train()) == 4                 # of 10
    names = sorted(path.name for path in run.folder.glob("snapshot-*"))
    assert names[0] == "snapshot-000048" and names[-1] == "snapshot-000080"
    assert run.progress.sigma == 0                          # the blur of a tenth of the run is long gone
    resumed = make_run(tmp_path / "new")
    resumed.load(latest_checkpoint(run.folder))
    assert resumed.progress.first_step == 6
    for kimg in (0.08, 1.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="--resume-kimg: expected 0 up to less than --kimg 0.08"):
            start_from(make_run(tmp_path / "late"), Weights(tmp_path, 16, "standardize", old.average.state_dict()), kimg)


def test_a_run_that_was_started_from_weights_resumes_exactly(tmp_path):
    save_snapshot(tmp_path / "snapshot", trained(tmp_path / "old").average)
    start = find_start(tmp_path, "x", str(tmp_path / "snapshot"), config())
    straight, stopped = make_run(tmp_path / "a", train_mode="freeze8"), make_run(tmp_path / "b", train_mode="freeze8")
    for run, steps in ((straight, 4), (stopped, 2)):
        start_from(run, start, 0.016)
        for _ in range(steps):
            run.one_step()
    stopped.save()
    resumed = make_run(tmp_path / "b", train_mode="freeze8")
    resumed.load(latest_checkpoint(tmp_path / "b"))
    for _ in range(2):
        resumed.one_step()
    for part, name in (("generator", "generator"), ("discriminator", "discriminator")):
        first, second = (getattr(run.gan, part).state_dict() for run in (resumed, straight))
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_the_same_resolution_goes_on_exactly_a_higher_one_is_refused_and_nothing_is_a_new_run(tmp_path):
    trained(tmp_path / "small")
    assert isinstance(find_start(tmp_path, "x", str(tmp_path / "small"), config()), Checkpoint)
    weights = find_start(tmp_path, "x", str(tmp_path / "small"), config(), as_weights=True)
    report = start_from(make_run(tmp_path / "other", train_mode="freeze8", g_lr=0.001), weights)
    assert [line for line in report if "new here" in line or "without a place" in line or "anew" in line] == []     # heads and all
    assert find_start(tmp_path, "x", None, config()) is None and find_start(tmp_path / "none", "x", "auto", config()) is None
    with pytest.raises(OptionError, match="--img-resolution: expected at least the 16 px"):
        find_start(tmp_path, "x", str(tmp_path / "small"), config(img_resolution=8))
    with pytest.raises(InputError, match="or a snapshot folder; found none there"):
        find_start(tmp_path, "x", str(tmp_path), config())


def test_statistics_of_another_scaling_and_weights_of_another_kind_are_not_taken(tmp_path):
    old = trained(tmp_path / "old")
    run, fresh = make_run(tmp_path / "l2", cond_norm="l2"), make_run(tmp_path / "fresh", cond_norm="l2")
    weights = Weights(tmp_path, 16, "standardize", old.gan.generator.state_dict())
    report = start_from(run, weights)
    assert torch.equal(run.gan.generator.condition.mean, fresh.gan.generator.condition.mean) and "condition.mean" in report[1]
    with pytest.raises(WeightsError, match="some that fit this generator; found none"):
        start_from(fresh, replace(weights, generator={"x": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="NaN or infinite"):
        start_from(fresh, replace(weights, generator={"x": torch.full((1,), torch.nan)}))


def test_an_encoder_of_the_same_genes_is_taken_and_one_of_others_is_refused(tmp_path):
    old = make_mode_run(tmp_path / "old", "mlp")
    for _ in range(2):
        old.one_step()
    old.save()
    save_snapshot(tmp_path / "snapshot", old.average, gene_encoder=old.mlp_average)
    start = find_start(tmp_path, "x", str(tmp_path / "snapshot"), config(encoder="mlp"))
    run = make_mode_run(tmp_path / "new", "mlp")
    start_from(run, start)
    for own in (run.mlp, run.mlp_average):
        assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), old.mlp_average.state_dict().values(), strict=True))
    with pytest.raises(WeightsError, match="genes: expected those of the expression"):
        start_from(run, replace(start, genes_sha256="other"))
    from_checkpoint = find_start(tmp_path, "x", str(tmp_path / "old"), config(encoder="mlp", img_resolution=32))
    assert from_checkpoint.genes_sha256 == start.genes_sha256 and from_checkpoint.mlp


def test_going_on_from_an_older_checkpoint_wants_the_later_ones_away(tmp_path):
    run = make_run(tmp_path / "00000-x")
    list(run.train())
    kept = sorted((tmp_path / "00000-x").glob("checkpoint-*"))
    with pytest.raises(OptionError, match=f"--resume: expected no checkpoints later than {kept[0].name}.* with 1 .{kept[1].name}"):
        find_start(tmp_path, "x", str(kept[0]), config())
    assert find_start(tmp_path, "x", str(kept[1]), config()).folder == kept[1]
    assert isinstance(find_start(tmp_path, "x", str(kept[0]), config(), as_weights=True), Weights)      # a new run, in a folder of its own


def test_auto_does_not_begin_anew_where_all_checkpoints_are_damaged(tmp_path):
    trained(tmp_path / "00000-x")
    for path in tmp_path.glob("*/checkpoint-*/generator.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    for said in ("auto", str(tmp_path / "00000-x")):
        with pytest.raises(WeightsError, match="00000-x: checkpoints: expected one that is whole; found damaged ones alone"):
            find_start(tmp_path, "x", said, config())
