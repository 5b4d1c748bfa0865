"""`calculate_image_quality_metrics.py`: one row a call, with floors, flags and a cache."""
import time

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter

import calculate_image_quality_metrics as command
from evaluation.image_quality import COLUMNS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Smooth coloured patches: real, more of the same kind, noise, the real ones blurred and in another order."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(2)

    def smooth(n):
        coarse = rng.integers(0, 256, size=(n, 4, 4, 3), dtype=np.uint8)
        return [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in coarse]

    def write(name, images):
        (root / name).mkdir()
        for number, image in enumerate(images):
            image.save(root / name / f"patch_{number:03d}.png")
    real = smooth(40)
    write("real", real)
    write("alike", smooth(40))
    write("fewer", smooth(22))
    write("permuted", [real[i] for i in rng.permutation(40)])
    write("blurred", [image.filter(ImageFilter.GaussianBlur(3)) for image in real])
    write("noise", [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(40)])
    (root / "real" / "notes.txt").write_text("not an image")
    return root


def run(folders, out, generated, *extra, reference="real", features="random_tiny"):
    references = ",".join(str(folders / name) for name in reference.split(","))
    return CliRunner().invoke(command.main, ["--experiment", generated, "--ref-img-path", references,
                                             "--gen-img-path", str(folders / generated),
                                             "--out-dir", str(out), "--features", features, "--device", "cpu", *map(str, extra)])


def rows(out):
    return pd.read_csv(out / "image_quality_metrics.csv")


def test_each_call_appends_one_row_with_the_originals_columns_first(folders, tmp_path):
    for generated in ("alike", "noise"):
        answer = run(folders, tmp_path, generated)
        assert answer.exit_code == 0, answer.output
    table = rows(tmp_path)
    assert table.experiment.tolist() == ["alike", "noise"]
    assert table.columns.tolist() == list(COLUMNS) and list(COLUMNS[:5]) == ["experiment", "FID", "KID_mean", "KID_std", "seed"]
    assert (table.n_reference == 40).all() and (table.n_floor == 20).all() and (table.n_ignored == 1).all()
    assert f"wrote {tmp_path / 'image_quality_metrics.csv'}" in answer.output


def test_noise_lies_above_the_floor_and_more_of_the_same_kind_does_not(folders, tmp_path):
    run(folders, tmp_path, "alike")
    run(folders, tmp_path, "blurred")
    run(folders, tmp_path, "noise")
    alike, blurred, noise = rows(tmp_path).to_dict("records")
    for name in ("FID", "KID"):
        assert noise[f"{name}_at_floor_n_low"] > noise[f"{name}_floor_high"]
        assert alike[f"{name}_at_floor_n_low"] < alike[f"{name}_floor_high"]
        assert alike[f"{name}_floor"] == pytest.approx(noise[f"{name}_floor"], rel=1e-4)      # the floor is the reference's alone
    assert alike["FID"] < blurred["FID"] < noise["FID"]
    assert all(alike[name] > 0.7 > 0.2 > noise[name] for name in ("precision", "density", "coverage"))
    assert all(row["FID_low"] <= row["FID"] <= row["FID_high"] for row in (alike, blurred, noise))


def test_the_distance_at_infinite_n_has_an_interval_and_lies_below_the_one_at_n(folders, tmp_path):
    for generated in ("alike", "noise"):
        answer = run(folders, tmp_path, generated)
        assert "at infinite n" in answer.output
    alike, noise = rows(tmp_path).to_dict("records")
    assert alike["FID_infinite"] < alike["FID"] and alike["FID_infinite_low"] < 0 < noise["FID_infinite_low"]
    assert all(row["FID_infinite_low"] < row["FID_infinite"] < row["FID_infinite_high"] for row in (alike, noise))
    answer = run(folders, tmp_path, "alike", "--num", 15)
    assert answer.exit_code == 0 and "at infinite n" not in answer.output and np.isnan(rows(tmp_path).FID_infinite.iloc[-1])


def test_a_folder_against_itself_is_zero_in_any_order(folders, tmp_path):
    run(folders, tmp_path, "real")
    run(folders, tmp_path, "permuted")
    same, permuted = rows(tmp_path).to_dict("records")
    scale = 0.05
    assert same["FID"] == pytest.approx(0, abs=1e-4) and permuted["FID"] == pytest.approx(0, abs=1e-4)
    assert abs(same["KID_mean"]) < scale and permuted["KID_mean"] == pytest.approx(same["KID_mean"], abs=1e-5)


def test_small_and_unequal_n_are_measured_with_a_notice_and_a_flag(folders, tmp_path):
    answer = run(folders, tmp_path, "fewer")
    (row,) = rows(tmp_path).to_dict("records")
    assert answer.exit_code == 0 and "KID subsets hold 22 images instead of 1,000" in answer.output
    assert (row["n_reference"], row["n_generated"], row["n_floor"], row["kid_subset"]) == (40, 22, 20, 22)
    assert row["flags"] == "n < 2048; KID subset 22; unequal n"


def test_several_reference_folders_are_taken_together(folders, tmp_path):
    assert run(folders, tmp_path, "noise", reference="real,alike").exit_code == 0
    (row,) = rows(tmp_path).to_dict("records")
    assert row["n_reference"] == 80 and row["reference"].endswith("alike") and row["flags"].endswith("unequal n")


def test_one_row_for_each_feature_set(folders, tmp_path):
    answer = run(folders, tmp_path, "noise", "--num", 4, features="random_tiny,efficientnet_lite0")
    assert answer.exit_code == 0, answer.output
    table = rows(tmp_path)
    assert table.features.tolist() == ["random_tiny", "efficientnet_lite0"] and table.weights_sha256.nunique() == 2
    assert table.FID.nunique() == 2


def test_num_draws_so_many_a_side_and_the_seed_repeats_it(folders, tmp_path):
    for part, seed in (("first", 1), ("again", 1), ("first", 2)):
        run(folders, tmp_path / part, "alike", "--num", 12, "--seed", seed)
    table = pd.concat([rows(tmp_path / "first").iloc[:1], rows(tmp_path / "again"), rows(tmp_path / "first").iloc[1:]], ignore_index=True)
    assert (table.n_reference == 12).all() and (table.n_generated == 12).all()
    assert table.FID[0] == table.FID[1] != table.FID[2]


def test_the_reference_comes_from_the_cache_and_gives_the_same_row(folders, tmp_path):
    for part in ("one", "two"):
        assert run(folders, tmp_path / part, "alike", "--cache-dir", tmp_path / "cache").exit_code == 0
    assert rows(tmp_path / "one").equals(rows(tmp_path / "two")) and len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_a_repeated_command_does_not_write_its_rows_twice_but_older_ones_may_come_again(folders, tmp_path):
    """Killed after the rows were written, before the page was, and given again."""
    for generated in ("alike", "alike", "noise", "noise", "alike"):
        assert run(folders, tmp_path, generated, "--num", 8).exit_code == 0
    assert rows(tmp_path).experiment.tolist() == ["alike", "noise", "alike"]


def test_rows_of_the_originals_five_columns_are_kept(folders, tmp_path):
    (tmp_path / "image_quality_metrics.csv").write_text("experiment,FID,KID_mean,KID_std,seed,note\nold,1.50,0.1,0.01,7,mine\n")
    run(folders, tmp_path, "alike")
    table = pd.read_csv(tmp_path / "image_quality_metrics.csv", dtype=str)
    assert table.experiment.tolist() == ["old", "alike"] and table.FID[0] == "1.50" and table.note[0] == "mine"


def test_the_report_is_one_file_with_the_rows_numbers(folders, tmp_path):
    answer = run(folders, tmp_path, "blurred", "--report", tmp_path / "page.html")
    assert answer.exit_code == 0, answer.output
    html, (row,) = (tmp_path / "page.html").read_text(), rows(tmp_path).to_dict("records")
    assert "data:image/png;base64," in html and 'name="viewport"' in html
    assert "http:" not in html and "https:" not in html and "<script" not in html
    assert f"{row['n_floor']:,}" in html and "n &lt; 2048" in html and (tmp_path / "page.json").exists()


@pytest.mark.parametrize(("extra", "code", "message"), [
    (["--features", "unknown_net"], 2, "unknown_net"),
    (["--features", "random_tiny,random_tiny"], 2, "each once"),
    (["--num", "2"], 2, "--num: expected at least 4; found 2"),
    (["--gen-img-path", "nowhere"], 3, "nowhere: folder: expected a folder of images; found nothing there"),
    (["--weights", "file.pth"], 2, "--weights: expected inception among --features"),
    (["--features", "timm:mobilenetv2_100"], 3, "image encoder weights"),
    (["--ref-img-path", " , "], 2, "expected a folder, or several separated by commas; found nothing"),
    (["--ref-img-path", "here,./here"], 2, "expected every folder once"),
    (["--device", "mps"], 2, "--device: expected auto, cpu, cuda or cuda:N; found mps"),
], ids=["unknown encoder", "twice", "too few", "no folder", "weights of nothing", "no weight file", "no reference", "a folder twice",
        "a device that is none"])
def test_wrong_arguments_are_one_line_and_write_no_row(folders, tmp_path, extra, code, message):
    answer = run(folders, tmp_path, "alike", *extra)
    assert answer.exit_code == code and message in answer.output and "Traceback" not in answer.output
    assert not (tmp_path / "image_quality_metrics.csv").exists()


def test_a_truncated_image_is_named_and_no_row_is_written(folders, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in sorted((folders / "alike").glob("*.png"))[:6]:
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "patch_003.png").write_bytes((damaged / "patch_003.png").read_bytes()[:90])
    answer = run(folders, tmp_path, "alike", "--gen-img-path", damaged)
    assert answer.exit_code == 3 and "patch_003.png" in answer.output and not (tmp_path / "image_quality_metrics.csv").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01" * 9, b'a,b\n"unclosed'], ids=["empty", "not text", "broken off"])
def test_a_damaged_table_is_said_before_the_work_and_left_alone(folders, tmp_path, content):
    (tmp_path / "image_quality_metrics.csv").write_bytes(content)
    answer = run(folders, tmp_path, "alike")
    assert answer.exit_code == 3 and "image_quality_metrics.csv: " in answer.output and "another --out-dir" in answer.output
    assert "image/s" not in answer.output and (tmp_path / "image_quality_metrics.csv").read_bytes() == content


def test_a_damaged_cache_file_is_made_anew(folders, tmp_path):
    assert run(folders, tmp_path, "alike", "--cache-dir", tmp_path / "cache").exit_code == 0
    (cached,) = (tmp_path / "cache").glob("*.npy")
    whole = cached.read_bytes()
    for content in (whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        cached.write_bytes(content)
        assert run(folders, tmp_path, "alike", "--cache-dir", tmp_path / "cache").exit_code == 0
        assert cached.read_bytes() == whole


@pytest.mark.parametrize(("content", "message"), [
    (b"prompt,file\n1\n", "file: expected a name in every row; found none in rows 1 (1)"),
    ("file,é\na.png,1\n".encode("latin-1"), "in UTF-8; found other bytes"),
], ids=["a short row", "not UTF-8"])
def test_a_damaged_samples_csv_is_one_line(folders, tmp_path, content, message):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "samples.csv").write_bytes(content)
    answer = run(folders, tmp_path, "alike", "--gen-img-path", tmp_path / "made")
    assert answer.exit_code == 3 and "samples.csv: " in answer.output and message in answer.output


def test_help_names_the_options_at_once():
    started = time.monotonic()
    answer = CliRunner().invoke(command.main, ["--help"])
    assert answer.exit_code == 0 and time.monotonic() - started < 2
    assert all(option in answer.output for option in ("--experiment", "--ref-img-path", "--gen-img-path", "--out-dir", "--cache-dir"))


@pytest.mark.parametrize(("content", "code", "message"), [
    ({}, 3, "expected images (png, jpg, tif, bmp, webp); found none among 0 files"),
    ({"notes.txt": b"x"}, 3, "found none among 1 files"),
    ({"a.png": b""}, 3, "a.png"),
    ({f"{i}.png": b"not an image" for i in range(5)}, 3, "0.png"),
    ({".hidden.png": b"x"}, 3, "none among 0 files"),
], ids=["empty folder", "no images", "an empty file", "other bytes", "hidden files alone"])
def test_folders_that_hold_no_images_are_one_line(folders, tmp_path, content, code, message):
    (tmp_path / "made").mkdir()
    for name, data in content.items():
        (tmp_path / "made" / name).write_bytes(data)
    if "a.png" in content:
        for path in sorted((folders / "alike").glob("*.png"))[:5]:
            (tmp_path / "made" / path.name).write_bytes(path.read_bytes())
    answer = run(folders, tmp_path, "alike", "--gen-img-path", tmp_path / "made")
    assert answer.exit_code == code and message in answer.output and "Traceback" not in answer.output
    assert not (tmp_path / "image_quality_metrics.csv").exists()


def test_images_of_mixed_sizes_in_one_folder_are_measured_each_at_its_size_and_flagged(folders, tmp_path):
    (tmp_path / "mixed").mkdir()
    for number, path in enumerate(sorted((folders / "real").glob("*.png"))):
        side = (32, 48, 64)[number % 3]
        Image.open(path).resize((side, side), Image.Resampling.BICUBIC).save(tmp_path / "mixed" / path.name)
    found = []
    for number, extra in enumerate(([], ["--batch-size", 7], ["--match-px", 32])):
        answer = run(folders, tmp_path / str(number), "real", "--gen-img-path", tmp_path / "mixed", *extra)
        assert answer.exit_code == 0, answer.output
        found.append(rows(tmp_path / str(number)))
    table = pd.concat(found, ignore_index=True)
    assert (table.n_generated == 40).all() and table.FID[0] == pytest.approx(table.FID[1], rel=1e-3) and table.FID[2] != table.FID[0]
    assert table["flags"][0].endswith("unequal sizes: 32 and 32 to 64 px") and "sizes" not in table["flags"][2]


def test_match_px_takes_a_difference_in_sharpness_away(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        large = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        for folder, image in (("real", large), ("generated", large.resize((32, 32), Image.Resampling.BOX))):
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f"{i}.png")
    options = ["--experiment", "e", "--ref-img-path", str(tmp_path / "real"), "--gen-img-path", str(tmp_path / "generated"),
               "--features", "random_tiny", "--out-dir", str(tmp_path)]
    plain, matched = (CliRunner().invoke(command.main, [*options, *extra]) for extra in ([], ["--match-px", "32"]))
    assert plain.exit_code == matched.exit_code == 0, plain.output + matched.output
    assert "unequal sizes: 64 and 32 px" in plain.output and "unequal sizes" not in matched.output
    first, second = pd.read_csv(tmp_path / "image_quality_metrics.csv").to_dict("records")
    assert abs(second["FID"]) < 1e-4 < first["FID"] and second["match_px"] == 32
    assert "unequal sizes: 64 and 32 px" in first["flags"] and "sizes" not in second["flags"]


def test_a_cluster_shows_real_patches_beside_those_made_from_the_same_spots(tmp_path):
    from evaluation.image_quality_page import row_of_group
    real = {name: tmp_path / f"real_{name}.png" for name in "abcde"}
    members = [(name, tmp_path / f"{name}_{seed}.png") for name in "abcdex" for seed in (0, 1)]
    left, right = row_of_group(members, real)
    assert [path.stem.removeprefix("real_") for path in left] == [path.stem[0] for path in right] and 1 < len(left) <= 5
    assert row_of_group([("a", tmp_path / "a_0.png"), ("a", tmp_path / "a_1.png")], real) == (
        [real["a"]], [tmp_path / "a_0.png", tmp_path / "a_1.png"])
    assert row_of_group([("", tmp_path / "x.png")], real) == ([], [tmp_path / "x.png"])
