"""Whatever stands in a file that a user hands over, its reader returns, or refuses it in one line that names that very file.

Every reader of `user_files.py` and `user_arrays.py` gets damaged copies of a valid file, by hypothesis: cells, lines and bytes of a
text, items of an HDF5 file, other arrays, other columns of a parquet table.
"""
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from damage import ARRAYS, change_hdf5, damaged_hdf5, damaged_text, items_of
from fault_rounds import rounds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from user_arrays import HDF5, NPY
from user_files import TEXTS, section
from visium_folders import write_hd

from preprocessing.errors import InputError, OptionError

SECONDS = 10                       # for one file of a few kB; a reader that takes longer hangs
INPUTS = rounds(15, 200)           # a reader, all different
FUZZ = settings(max_examples=4 * INPUTS, derandomize=True, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck))
ELSEWHERE = {                      # reader -> what else a message may name, as what is at fault cannot be told from it
    "10x features.tsv": "v/filtered_feature_bc_matrix",      # no counts left, as other features are no genes: the matrix may be empty
    "denoiser of a base": "unet/diffusion_pytorch_model.safetensors.index.json",       # weights that do not fit the config
    "autoencoder of a base": "vae/diffusion_pytorch_model.safetensors",                # the same
}
CONTENT_ALONE = ("cohort settings", "CLIP settings", "seeds")      # the reader gets what stands in the file: its caller names that


def check(read, folder: Path, damaged: Path, reader: str = "") -> None:
    """Reading ends in time, with a result or with one line that names the damaged file."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except (InputError, OptionError) as error:
        said = str(error)
        assert "\n" not in said.strip() and len(said) < 2000, said[:3000]
        named = [str(damaged), *([f"{folder / ELSEWHERE[reader]}: "] if reader in ELSEWHERE else [])]
        assert reader in CONTENT_ALONE or any(path in said for path in named), f"{damaged} is not named: {said}"
    assert time.monotonic() - start < SECONDS, "it hangs"


def fuzz(inputs, put, read, folder: Path, damaged: Path, tried, reader: str = "") -> None:
    """`put` INPUTS different inputs in the place of the damaged file, one after the other, and read each."""
    survived, has_failed = set(), False

    @FUZZ
    @given(inputs)
    def one(what):
        nonlocal has_failed
        if repr(what) in survived or len(survived) == INPUTS and not has_failed:       # hypothesis repeats itself
            return
        put(what)
        tried()
        try:
            check(read, folder, damaged, reader)
        except BaseException:
            has_failed = True
            raise
        survived.add(repr(what))

    one()
    assert len(survived) >= INPUTS, f"hypothesis found {len(survived)} different inputs of {INPUTS}"


@pytest.mark.fault("fuzzed text")
@pytest.mark.parametrize("reader", TEXTS)
def test_a_damaged_text_is_read_or_refused_in_one_line(reader, tmp_path, tried):
    write, name, read = TEXTS[reader]
    write(tmp_path)
    path = tmp_path / name
    read(tmp_path)                   # as it is, it is refused by nobody
    fuzz(damaged_text(path.read_bytes()), path.write_bytes, read, tmp_path, path, tried, reader)


@pytest.mark.fault("fuzzed HDF5 file")
@pytest.mark.parametrize("reader", HDF5)
def test_an_hdf5_file_with_other_items_is_read_or_refused_in_one_line(reader, tmp_path, tried):
    write, name, read = HDF5[reader]
    write(tmp_path)
    path, copy = tmp_path / name, tmp_path / "copy"
    read(tmp_path)
    shutil.copy(path, copy)

    def put(changes):
        shutil.copy(copy, path)
        change_hdf5(path, changes)

    fuzz(damaged_hdf5(items_of(path)), put, read, tmp_path, path, tried, reader)


@pytest.mark.fault("fuzzed array")
@pytest.mark.parametrize("reader", NPY)
def test_another_array_is_read_or_refused_in_one_line(reader, tmp_path, tried):
    path = tmp_path / "f.npy"
    np.save(path, np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5))
    arrays = {**ARRAYS, "texts": np.array(["a", "b", ""] * 2), "labels": np.arange(6) % 2, "rows": np.full((6, 5), 0.5),
              "objects": np.array([{}, None] * 3, object), "dates": np.array(["2020-01-01", "NaT"] * 3, "M8[D]")}

    def put(what):
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what == "several":
            np.savez(path.with_suffix(".npz"), a=np.ones(2))
            shutil.move(path.with_suffix(".npz"), path)
        else:
            np.save(path, arrays[what], allow_pickle=True)

    anything = st.one_of(damaged_text(path.read_bytes()), st.sampled_from([*arrays, "several"]))
    fuzz(anything, put, NPY[reader], tmp_path, path, tried, reader)


@pytest.mark.fault("fuzzed parquet file")
def test_a_damaged_parquet_table_is_read_or_refused_in_one_line(tmp_path, tried):
    write_hd(tmp_path / "v")
    path = next(tmp_path.rglob("tissue_positions.parquet"))
    table = pd.read_parquet(path)
    values = {"words": "x", "none": None, "nan": np.nan, "fractions": 1.5, "huge": 2 ** 40, "negative": -1, "bytes": b"\xff",
              "lists": [[1, 2]] * len(table), "dates": pd.Timestamp("2020-01-01"), "truths": True}

    def put(what):
        if isinstance(what, bytes):
            path.write_bytes(what)
            return
        column, kind = what
        changed = table.drop(columns=column) if kind == "gone" else pd.concat([table, table[:3]]) if kind == "twice" else \
            table.assign(**{column: values[kind]})
        changed.to_parquet(path, index=False)

    other = st.tuples(st.sampled_from(list(table.columns)), st.sampled_from([*values, "gone", "twice"]))
    fuzz(st.one_of(damaged_text(path.read_bytes()), other), put, lambda f: section(f / "v"), tmp_path, path, tried)
