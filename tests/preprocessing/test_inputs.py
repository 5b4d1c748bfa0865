"""Lists of paths are read as they are meant, commas in a name or not."""
from pathlib import Path

import pytest

from preprocessing.inputs import path_list


@pytest.mark.parametrize("said, expected", [
    ("a,b", ["a", "b"]), (" a , b ,", ["a", "b"]), ("", []), (" , ", []), ("a", ["a"]), (Path("a,b"), ["a,b"]),
    ([Path("a,b"), Path("c")], ["a,b", "c"]),
])
def test_a_list_has_commas_between_its_paths(said, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert path_list(said) == [Path(path) for path in expected]


@pytest.mark.parametrize("name", ["HER2, left", "a,b"])
def test_what_exists_as_it_is_said_is_one_path_commas_and_all(name, tmp_path):
    (tmp_path / name).mkdir()
    assert path_list(f" {tmp_path / name} ") == [tmp_path / name]
    assert len(path_list(f"{tmp_path / name},{tmp_path}")) == 3


@pytest.mark.parametrize("said", ["a\0,b", ",".join(["x" * 200] * 50)], ids=["a zero byte", "no name of a file"])
def test_what_can_be_no_path_is_a_list_that_names_nothing_there(said):
    assert not any(path.name in ("", said) for path in path_list(said)) and len(path_list(said)) in (2, 50)
