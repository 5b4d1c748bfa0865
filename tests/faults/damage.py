"""Damage files on purpose: texts, tables and JSON, HDF5 files and arrays, by hypothesis' draws. Not a test file."""
import re

import h5py
import numpy as np
from hypothesis import strategies as st

TOKENS = [b"", b" ", b"nan", b"NaN", b"inf", b"-1", b"0", b"1.5", b"1e999", b"99999999999", b"9" * 30, b"1" + b"0" * 400,
          b"true", b"null", b"[]",
          b"{}", b'""', b'"', b"'", b"x", b"\0", b"\n", b"\r\n", b"\r", b",", b"\t", b":", b"#", b"\xef\xbb\xbf", b"\xff", b"\xc3\xa9",
          b"../../x",
          b"/etc/passwd", b"\\ud800", b"[" * 3000, b'{"a":' * 3000, b"!!python/object/apply:os.mkdir [x]", b"Infinity", b"1_0", b"=1+1",
          b"0x10", b"\xe2\x80\xa8", b"a" * 70_000, b"NA", b"-0", b"&a [*a]", b"2020-01-01"]
CELL = re.compile(rb"[^\s,:;\[\]{}\"<>]+")


def damaged_text(content: bytes):
    """Strategy: one to three changes of cells, lines or bytes of a text."""
    cells = [match.span() for match in CELL.finditer(content)] or [(0, len(content))]
    place = st.integers(0, len(content))
    change = st.one_of(
        st.tuples(st.just("cell"), st.sampled_from(cells), st.sampled_from(TOKENS)),
        st.tuples(st.just("cell"), st.sampled_from(cells), st.sampled_from(TOKENS)),
        st.tuples(st.just("put"), place, st.sampled_from(TOKENS)),
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("cut"), place, st.integers(1, 40)),
        st.tuples(st.just("line"), st.integers(0, content.count(b"\n")), st.sampled_from([0, 2, 3])),
        st.tuples(st.just("end"), place, st.none()),
        st.tuples(st.just("only"), st.none(), st.one_of(st.sampled_from(TOKENS), st.binary(max_size=60))))
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _changed(content, changes))


def _changed(content: bytes, changes) -> bytes:
    # from the end to the front, so that places stay what they were
    for kind, where, what in sorted(changes, key=lambda change: repr(change[0]) + repr(change[1]).zfill(30), reverse=True):
        if kind == "cell":
            content = content[:where[0]] + what + content[where[1]:]
        elif kind == "put":
            content = content[:where] + what + content[where:]
        elif kind == "flip" and where < len(content):
            content = content[:where] + bytes([content[where] ^ 1 << what]) + content[where + 1:]
        elif kind == "cut":
            content = content[:where] + content[where + what:]
        elif kind == "line":
            lines = content.split(b"\n")
            content = b"\n".join(lines[:where] + lines[where:where + 1] * what + lines[where + 1:])
        elif kind == "end":
            content = content[:where]
        elif kind == "only":
            content = what
    return content


ARRAYS = {
    "empty": np.empty(0), "scalar": np.array(1.0), "nan": np.array([np.nan, 1.0, -np.inf]), "negative": np.array([-1, 2, -3]),
    "fractions": np.array([0.5, 1.5, 2.5]), "huge": np.array([2 ** 62, 1, 2 ** 62]), "unsigned": np.array([2 ** 64 - 1], dtype="u8"),
    "square": np.arange(9.0).reshape(3, 3), "cube": np.zeros((2, 2, 2), "f4"), "booleans": np.array([True, False, True]),
    "bytes": np.array([b"a", b"b", b"a"]), "not utf-8": np.array([b"\xff\xfe", b"\xc3"]), "complex": np.array([1j, 2.0]),
    "half": np.ones(3, "f2"), "records": np.zeros(3, dtype=[("a", "i4"), ("b", "f4")]), "no rows": np.empty((0, 5)),
    "wide": np.ones((1, 70_000), "u1"),
}


def items_of(path) -> list[str]:
    with h5py.File(path) as file:
        found: list[str] = []
        file.visit(found.append)
    return found


def damaged_hdf5(items: list[str]):
    """Strategy: one to three changes of an HDF5 file's items, to be made by `change_hdf5`."""
    change = st.tuples(st.sampled_from(items), st.sampled_from(["gone", "group", "short", "long", "values", "attributes", "text", *ARRAYS]))
    return st.lists(change, min_size=1, max_size=3)


def change_hdf5(path, changes) -> None:
    with h5py.File(path, "r+") as file:
        for name, kind in changes:
            if name not in file:
                continue
            item, attributes = file[name], dict(file[name].attrs)
            if kind == "attributes":
                for key in list(item.attrs):
                    item.attrs[key] = "other"
                continue
            if kind in ("short", "long", "values"):
                if not isinstance(item, h5py.Dataset) or item.shape in ((), None):
                    continue
                old = item[()]
                new = old[:-1] if kind == "short" else np.concatenate([old, old[:2]]) if kind == "long" else old[::-1]
                del file[name]
                file.create_dataset(name, data=new, dtype=item.dtype)
            else:
                del file[name]
                if kind == "group":
                    file.create_group(name)
                elif kind == "text":
                    file[name] = "words"
                elif kind != "gone":
                    file[name] = ARRAYS[kind]
            if name in file:
                file[name].attrs.update(attributes)
