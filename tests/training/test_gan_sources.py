"""Which files and which spots a run is trained on: out of options, masks and cluster names."""
import numpy as np
import pandas as pd
import pytest
import torch
from paired_samples import two_samples, write_sample

from networks.clip import CLIP, ClipModelConfig
from preprocessing.errors import InputError, OptionError
from training.gan_data import _data_name, load_gan_data
from training.gan_sources import gan_sources
from training.sample_sheet import read_sample_sheet
from training.spot_choice import SpotChoice, in_clusters, read_mask

OBS = pd.DataFrame({"cluster": pd.Categorical(["a", "b", None, "a"]), "good": [True, False, True, True], "depth": [1.5, 2, 3, 4]})
NOTHING = dict.fromkeys(("data", "gex", "samples", "val_data", "val_gex", "embeddings", "val_embeddings", "encoder", "network"))


def files(samples, **more):
    data, gex = (",".join(str(getattr(sample, name)) for sample in samples) for name in ("images", "gex"))
    return {**NOTHING, "data": data, "gex": gex, **more}


def test_the_data_of_a_cohort_have_a_short_name_of_their_own():
    few, many = ["C2", "C3", "C2"], [f"patient_{number:03d}_section" for number in range(40)]
    assert _data_name(few) == "C2-C3"
    assert _data_name(many).startswith("patient_000_section-and-39-more-") and len(_data_name(many)) < 60
    assert _data_name(many) != _data_name(many[:-1] + ["another"])


# ---- masks and clusters ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("content", "name"), [
    (np.array([True, False, True, True]), "mask.npy"),
    (np.array([3, 0, 2]), "mask.npy"),
    ("name,keep\nx,True\ny,False\nz,true\nw,1\n", "mask.csv"),
], ids=["booleans", "row numbers", "csv"])
def test_a_mask_is_booleans_or_row_numbers_or_a_column(tmp_path, content, name):
    np.save(tmp_path / name, content) if name.endswith("npy") else (tmp_path / name).write_text(content)
    assert read_mask(str(tmp_path / name), 4, OBS, "S").tolist() == [True, False, True, True]
    assert read_mask("good", 4, OBS, "S").tolist() == [True, False, True, True]


def test_a_mask_that_names_barcodes_is_joined_by_them_and_misses_none(tmp_path):
    path, obs = tmp_path / "mask.csv", OBS.set_axis(["S__a", "S__b", "S__c", "S__d"])
    path.write_text("spot,keep\nd,0\nc,0\nelsewhere,0\na,1\nb,1\n")
    assert read_mask(str(path), 4, obs, "S").tolist() == [True, True, False, False]
    for others in ("a,1\nx,0\ny,0\nz,1\n", "e,1\nf,0\ng,0\nh,1\n"):
        path.write_text("spot,keep\n" + others)
        with pytest.raises(InputError, match="every spot of S; found no line for [34]"):
            read_mask(str(path), 4, obs, "S")
    path.write_text("n_members,keep\n3,1\n2,1\n1,0\n0,0\n")                  # numbers are no barcodes, whatever obs_names are
    assert read_mask(str(path), 4, OBS, "S").tolist() == [True, True, False, False]


def test_samples_that_share_barcodes_are_told_apart_by_a_column_of_the_mask(tmp_path):
    path, obs = tmp_path / "mask.csv", OBS.set_axis(["S__a", "S__b", "T__a", "T__b"])
    path.write_text("sample_id,barcode,keep\nT,b,0\nT,a,1\nS,b,1\nS,a,0\n")
    assert read_mask(str(path), 4, obs, "S").tolist() == [False, True, True, False]
    path.write_text("sample_id,barcode,keep\nT,b,0\nT,a,1\n")
    assert read_mask(str(path), 2, OBS[:2].set_axis(["a", "b"]), "S").tolist() == [True, False]     # spots that name no sample
    path.write_text("barcode,keep\na,1\nb,0\n")
    with pytest.raises(InputError, match="no line for 4"):
        read_mask(str(path), 4, obs, "S")


@pytest.mark.parametrize(("content", "says"), [
    (np.array([True, False]), "one value for each of the 4 spots"),
    (np.array([0, 4]), "row numbers 0 up to 3"),
    (np.array([0, -1]), "row numbers 0 up to 3"),
    (np.array([1, 0, 1, 1]), "every one once"),
    (np.array([1.0, np.nan]), "booleans, or whole row numbers"),
    ("keep\nTrue\nTrue\n", "one value for each of the 4 spots"),
    ("keep\nTrue\nFalse\nnan\nTrue\n", "other values: 1 (nan)"),
    ("", "a CSV with a header line"),
], ids=str)
def test_masks_of_wrong_length_kind_or_range_are_refused(tmp_path, content, says):
    path = tmp_path / ("mask.csv" if isinstance(content, str) else "mask.npy")
    path.write_text(content) if isinstance(content, str) else np.save(path, content)
    with pytest.raises(InputError) as refusal:
        read_mask(str(path), 4, OBS, "S")
    assert says in str(refusal.value) and path.name in str(refusal.value)


def test_a_mask_that_is_nowhere_or_of_numbers_is_refused_with_the_columns_there_are():
    for mask, says in (("bad", "bad; columns: cluster, good, depth"), ("depth", "other values: 4 (1.5, 2.0, 3.0, 4.0)")):
        with pytest.raises(InputError) as refusal:
            read_mask(mask, 4, OBS, "S")
        assert says in str(refusal.value)
    with pytest.raises(InputError, match="columns: none"):
        read_mask("good", 4, None, "S")


def test_clusters_are_chosen_by_name_and_spots_without_one_belong_to_none():
    assert in_clusters("a", OBS, "S", "--train-clusters").tolist() == [True, False, False, True]
    assert in_clusters(" b, a", OBS, "S", "--train-clusters").tolist() == [True, True, False, True]
    for names, obs, says in (("a,c", OBS, "names among a, b; found c"), ("nan", OBS, "found nan"), (",", OBS, "no name"),
                             ("a", OBS[["good"]], "no such column"), ("a", None, "no expression")):
        with pytest.raises(InputError) as refusal:
            in_clusters(names, obs, "S", "--train-clusters")
        assert says in str(refusal.value)


def test_mask_clusters_and_subset_follow_each_other():
    assert SpotChoice(mask="good", train_clusters="a").training_rows(4, OBS, "S", 0).tolist() == [0, 3]
    assert len(SpotChoice(mask="good", n_train=2).training_rows(4, OBS, "S", 0)) == 2
    assert SpotChoice(val_clusters="b").validation_rows(4, OBS, "S").tolist() == [1]
    assert SpotChoice(mask="good", val_clusters="b").record == {"mask": "good", "val_clusters": "b"} and SpotChoice().record == {}
    with pytest.raises(InputError, match="--mask and --train-clusters: expected some spots; found none"):
        SpotChoice(mask="good", train_clusters="b").training_rows(4, OBS, "S", 0)


# ---- where prompts come from ----------------------------------------------------------------------------------------

def test_options_say_where_prompts_come_from(tmp_path):
    samples = two_samples(tmp_path)
    kind = {name: gan_sources(**said, guided=guided).encoder for name, said, guided in (
        ("clip", files(samples, network="clip"), False), ("mlp", files(samples, encoder="mlp"), False),
        ("ready", files(samples, embeddings="a.npy,b.npy"), False), ("guided", files(samples, embeddings="a.npy,b.npy", network="c"), True),
        ("none", {**files(samples), "gex": None}, False))}
    assert kind == {"clip": "clip", "mlp": "mlp", "ready": "ready", "guided": "ready", "none": "none"}


@pytest.mark.parametrize(("changes", "guided", "says"), [
    ({}, False, "--network: expected CLIP weights that embed the expression"),
    ({"encoder": "mlp", "network": "c"}, False, "--network: expected nothing"),
    ({"embeddings": "a.npy,b.npy", "network": "c"}, False, "--network: expected nothing"),
    ({"embeddings": "a.npy,b.npy"}, True, "--network: expected CLIP weights with --clip-weight"),
    ({"embeddings": "a.npy"}, False, "--embeddings: expected one .npy for each of the 2 files"),
    ({"embeddings": "a.npy,b.npy", "encoder": "mlp"}, False, "--encoder: expected nothing with ready-made"),
    ({"val_embeddings": "a.npy", "network": "c"}, False, "--val-embeddings: expected with --val-data"),
    ({"gex": None, "network": "c"}, False, "--network: expected --gex with it"),
    ({"gex": None, "encoder": "mlp"}, False, "--encoder: expected --gex with it"),
    ({"gex": None, "embeddings": "a.npy"}, False, "--embeddings: expected --gex with it"),
    ({"gex": None, "data": None}, False, "--data and --gex: expected both, or --samples; --data alone"),
    ({"data": None, "network": "c"}, False, "found --gex alone"),
], ids=str)
def test_options_that_do_not_belong_together_are_refused(tmp_path, changes, guided, says):
    with pytest.raises(OptionError) as refusal:
        gan_sources(**{**files(two_samples(tmp_path)), **changes}, guided=guided)
    assert says in str(refusal.value)


def ready(tmp_path, shapes=((10, 4), (10, 4)), **more):
    samples, paths = two_samples(tmp_path), []
    for number, shape in enumerate(shapes):
        rows = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
        np.save(tmp_path / f"emb{number}.npy", rows)
        paths.append(tmp_path / f"emb{number}.npy")
    return paths, gan_sources(**files(samples, embeddings=",".join(map(str, paths)), **more), guided=False)


def test_ready_embeddings_are_prompts_row_by_row_sample_after_sample_and_a_mask_takes_both(tmp_path):
    paths, sources = ready(tmp_path)
    data = load_gan_data(sources, 16, progress=False)
    rows = torch.from_numpy(np.concatenate([np.load(path) for path in paths]))
    assert torch.equal(data.training.prompts, rows) and data.gene_encoder is None
    assert data.sources[0]["embeddings"] == str(paths[0])
    np.save(tmp_path / "mask.npy", np.array([3, 12]))
    masked = load_gan_data(sources, 16, progress=False, choice=SpotChoice(mask=str(tmp_path / "mask.npy")))
    assert torch.equal(masked.training.prompts, rows[[3, 12]]) and torch.equal(masked.training.images, data.training.images[[3, 12]])
    assert masked.barcodes.tolist() == data.barcodes[[3, 12]].tolist() and masked.clusters.tolist() == data.clusters[[3, 12]].tolist()
    assert masked.record["n_spots"] == 2 and "mask" in masked.record["chosen"] and masked.sha256 != data.sha256


@pytest.mark.parametrize(("shapes", "says"), [
    (((9, 4), (10, 4)), "expected 10, one a spot"),
    (((10, 4), (10, 5)), "width of an embedding: expected 4"),
    (((10, 4, 1), (10, 4)), "(prompts, width)"),
], ids=str)
def test_ready_embeddings_of_wrong_shapes_are_refused(tmp_path, shapes, says):
    with pytest.raises(InputError) as refusal:
        load_gan_data(ready(tmp_path, shapes)[1], 16, progress=False)
    assert says in str(refusal.value) and "emb" in str(refusal.value)


def test_ready_embeddings_with_nan_or_not_there_are_refused(tmp_path):
    paths, sources = ready(tmp_path)
    np.save(paths[1], np.full((10, 4), np.nan, np.float32))
    with pytest.raises(InputError, match="emb1.npy.*NaN or infinite"):
        load_gan_data(sources, 16, progress=False)
    paths[1].unlink()
    with pytest.raises(InputError, match="emb1.npy.*nothing there"):
        load_gan_data(sources, 16, progress=False)


def test_a_sample_sheet_names_embeddings_beside_it_of_all_samples_or_none(tmp_path):
    samples = two_samples(tmp_path)
    np.save(tmp_path / "one" / "e.npy", np.ones((10, 4), np.float32))
    lines = [f"{sample.sample_id},{sample.images},{sample.gex},{split}" for sample, split in zip(samples, ("train", "val"), strict=True)]
    sheet = tmp_path / "sheet.csv"
    for second in ("one/e.npy", ""):
        sheet.write_text(f"sample_id,images,gex,split,embeddings\n{lines[0]},one/e.npy\n{lines[1]},{second}\n")
        assert read_sample_sheet(sheet)[0].embeddings == tmp_path / "one" / "e.npy"
        if second:
            sources = gan_sources(**{**NOTHING, "samples": sheet}, guided=False)
            assert sources.encoder == "ready" and sources.validation[0].embeddings == tmp_path / "one" / "e.npy"
        else:
            with pytest.raises(InputError, match="of every sample.*none of S2"):
                gan_sources(**{**NOTHING, "samples": sheet}, guided=False)


def test_patches_alone_are_read_in_their_order_under_names_of_their_own(tmp_path):
    samples = two_samples(tmp_path)
    sources = gan_sources(**{**files(samples), "gex": None, "val_data": str(samples[0].images)}, guided=False)
    data = load_gan_data(sources, 16, progress=False, choice=SpotChoice(n_train=15))
    assert data.name == "one-two" and data.training.prompts.shape == (15, 0) and len(data.validation.images) == 10
    assert data.barcodes[0].startswith("one__AAAC") and len(set(data.barcodes)) == 15
    every = load_gan_data(sources, 16, progress=False)
    assert every.training.images[10:, 0, 0, 0].tolist() == [20 * i + 7 for i in range(10)]
    with pytest.raises(InputError, match="no expression"):
        load_gan_data(sources, 16, progress=False, choice=SpotChoice(train_clusters="0"))


def test_an_encoder_trained_along_starts_from_the_seed_and_takes_one_gene_list_for_all(tmp_path):
    samples = two_samples(tmp_path)
    sources = gan_sources(**files(samples, encoder="mlp"), guided=False)
    first, again, other = (load_gan_data(sources, 16, progress=False, seed=seed) for seed in (0, 0, 1))
    assert first.training.prompts.shape == (20, 768) and first.training.expression.shape == (20, 3)
    assert first.sha256 == again.sha256 != other.sha256 and first.mlp.gene_names == ["Umod", "Actb", "Aqp2"]
    stranger = write_sample(tmp_path / "three", "S3", genes=["Umod", "Actb", "Nphs1"])
    sources = gan_sources(**files(samples, encoder="mlp", val_data=str(stranger.images), val_gex=str(stranger.gex)), guided=False)
    with pytest.raises(InputError, match="first difference at gene 3"):
        load_gan_data(sources, 16, progress=False)


def test_training_clusters_of_prompts_by_frozen_weights_are_those_of_the_whole_set(tmp_path):
    samples = two_samples(tmp_path)
    CLIP(ClipModelConfig(gene_encoder="bottleneck", gene_width=8, gene_hidden=8, projection=6, image_encoder="random_tiny"),
         ["Umod", "Actb", "Aqp2"], feature_width=32).eval().save_pretrained(tmp_path / "clip")
    sources = gan_sources(**files(samples, network=tmp_path / "clip"), guided=False)
    data, some = (load_gan_data(sources, 16, progress=False, choice=choice) for choice in (SpotChoice(), SpotChoice(train_clusters="1,2")))
    rows = np.flatnonzero(np.isin(data.clusters, ["1", "2"]))
    assert torch.allclose(some.training.prompts, data.training.prompts[rows], atol=1e-6) and set(some.clusters) == {"1", "2"}
    assert torch.equal(some.training.images, data.training.images[rows]) and some.gene_encoder == data.gene_encoder
