"""The one home of "a file is finished or it is not there": temporary name, validated, renamed; and of the locks beside it.
Where outputs may go: `output_places.py`.

A reader never sees a half-written file under its final name. What it was made from says its done-manifest (`done_manifests.py`).
"""
from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from preprocessing.output_places import UNFINISHED, FolderKind, require_no_folder, require_own_places, require_replaceable

MIB = 1 << 20
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)     # what only the output can be to blame for
OF_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)               # of a file system without flock, as mounts of clusters may be
SILENT_WAIT_S = 2                 # a lock that is free within this time is not worth a line
LEFTOVER = re.compile(rf"(.+?){UNFINISHED}", re.DOTALL)     # what is being written to, or replaced, by the process of that number


@contextmanager
def finished_file(path: Path | str, validate: Callable[[Path], object] | None = None, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success fsync, `validate(temporary)`, rename to `path`.

    On any error the temporary is removed and the old `path`, if there was one, stays as it was. Without `sync` a power cut may
    leave a torn file under the final name: for what the reader checks and can make again.
    """
    path = _named(path)
    require_no_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        yield temporary
        if sync:
            flush_to_disk(temporary)
        if validate is not None:
            validate(temporary)
        os.replace(temporary, path)
        if sync:
            flush_to_disk(path.parent)
    except Exception as error:
        raise_named(error, path)
    finally:
        temporary.unlink(missing_ok=True)


def raise_named(error: Exception, path: Path | str) -> NoReturn:
    """Raise the error of writing `path` again, with the file's name where it has none; before what was written so far is removed."""
    named = _named_error(error, path)
    raise named from (error.__cause__ if named is error else error)


def _named_error(error: Exception, path: Path | str) -> Exception:
    """Writing to an open file names none; numpy says how many items it wrote, torch and safetensors raise errors of their own."""
    if hasattr(error, "exit_code") or getattr(error, "filename", None) is not None:
        return error
    path = re.sub(r"\.tmp\.\d+$", "", str(path))           # of several files finished together: the name that it shall have
    number = _of_writing(error, Path(path).parent)
    if number is not None:
        return OSError(number, os.strerror(number), path)
    return OSError(f"{path}: {error}") if isinstance(error, OSError) and error.errno is None else error


def _of_writing(error: Exception, folder: Path) -> int | None:
    """Which of OF_WRITING is behind an error: by its number, else its words, those of what it was raised from, or the disk itself."""
    if (own := getattr(error, "errno", None)) is not None:
        return own if own in OF_WRITING else None
    behind: BaseException | None = error
    while behind is not None:
        for number in OF_WRITING:
            if getattr(behind, "errno", None) == number or os.strerror(number) in str(behind):
                return number
        behind = behind.__cause__ or behind.__context__
    return errno.ENOSPC if folder.is_dir() and shutil.disk_usage(folder).free < MIB else None


@contextmanager
def writes_to(path: Path | str) -> Iterator[None]:
    """For what is written without a temporary name (logs): an error of writing within this names `path` where it names no file."""
    try:
        yield
    except Exception as error:
        raise_named(error, path)


@contextmanager
def finished_together(paths: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Yield for each of several files a name to write it under; when all are written they get their own, one rename after the other.

    On an error before that none does. A process killed, or refused, between two renames leaves some new and some old: whoever reads
    them together compares their done-manifests, which come after.
    """
    require_own_places(paths)
    staged = {path: _named(path).with_name(f"{path.name}.tmp.{os.getpid()}") for path in paths}
    for path, temporary in staged.items():
        require_no_folder(path)
        temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield staged
        for temporary in staged.values():
            flush_to_disk(temporary)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    except Exception as error:
        raise_named(error, _named(paths[0]))
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def finished_within(folder: Path | str, listing: Sequence[str], older: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a hidden folder in `folder`, whose lock the caller holds, to write into; when all is written every file of it takes its name
    in `folder`, and what is `older` there and not written anew goes. Names are relative, everything else in `folder` stays.

    On an error before that `folder` stays as it was. The files of `listing` say what the others are: older ones go first and new ones
    come last, so that a process killed between two renames leaves no list of other files than lie there.
    """
    folder = _named(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers_in(folder)
    temporary = folder / f".new.tmp.{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        written = [path.relative_to(temporary).as_posix() for path in sorted(temporary.rglob("*")) if path.is_file()]
        for name in written:
            require_no_folder(folder / name)
            flush_to_disk(temporary / name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name in (*listing, *{*older}.difference(written)):
            (folder / name).unlink(missing_ok=True)
        for name in sorted(written, key=lambda name: name in listing):
            os.replace(temporary / name, folder / name)
        flush_to_disk(folder)
    except Exception as error:
        if getattr(error, "filename", None) is not None:       # the name that the file shall have
            error.filename = str(error.filename).replace(f"{temporary.name}{os.sep}", "")
        raise_named(error, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def finished_folder(path: Path | str, validate: Callable[[Path], object] | None = None, sync: bool = True, *,
                    kind: FolderKind | None = None) -> Iterator[Path]:
    """As `finished_file` for a whole folder. An older folder of that name and `kind` is replaced, only once the new one stands."""
    require_replaceable(path, kind)
    path = _named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if sync:
            for written in (*temporary.rglob("*"), temporary):
                flush_to_disk(written)
        if validate is not None:
            validate(temporary)
        replace_folder(temporary, path, kind)
    except Exception as error:
        raise_named(error, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path | str, kind: FolderKind | None = None) -> None:
    """Give a complete folder on the same disk its final name; an older folder of that name and `kind` goes once the new one stands."""
    require_replaceable(path, kind)
    path = _named(path)
    working_here = path.is_dir() and path.samefile(Path.cwd())
    old = path.with_name(f"{path.name}.old.{os.getpid()}")
    try:
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        if working_here:
            os.chdir(path)
        flush_to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():   # the second of the two renames failed: put the old one back
            os.rename(old, path)


def _named(path: Path | str) -> Path:
    """An absolute path with a last name, which `.`, `..` and `S1/..` lack, so that names can be made beside it. Of a link to a folder,
    the folder: else the link would be replaced."""
    path = Path(path)
    path = path.resolve() if ".." in path.parts or path.is_symlink() and path.is_dir() else path.absolute()
    if not path.name:
        raise OSError(errno.EINVAL, "nothing can be written in its place", str(path))
    return path


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path | str, content: object) -> None:
    """Write JSON by the rule of this module; keys keep their order."""
    with finished_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def nan_to_none(content: object) -> object:
    """Plain data for `write_json` in which numbers that are not finite, which JSON does not know, are null."""
    if isinstance(content, Mapping):
        return {name: nan_to_none(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [nan_to_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def done_path(path: Path | str) -> Path:
    """Where the done-manifest of a file or folder lies: beside it."""
    path = _named(path)
    return path.with_name(f"{path.name}.done.json")


def require_free_space(folder: Path | str, needed_bytes: int) -> None:
    """Raise `OSError` (exit code 4) if the disk that will hold `folder` has less than `needed_bytes` free."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"needs {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", str(folder))


@contextmanager
def only_writer(folder: Path | str, parts: Iterable[str] = ()) -> Iterator[None]:
    """Hold a run folder while working in it, and remove what killed runs left half-written there and in its `parts`. That of a live
    process is not waited for, which may be days: OSError (exit code 4)."""
    folder = Path(folder)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / "run", wait_s=0))
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            raise OSError(errno.EAGAIN, "another process is at work in this folder; name another one, or wait until it has ended",
                          str(folder)) from error
        for part in ("", *parts):
            clear_leftovers_in(folder / part)
        yield


@contextmanager
def locked(path: Path | str, wait_s: float = 3600, covers: Iterable[Path | str] = ()) -> Iterator[None]:
    """Hold the lock of one output while writing it, and what else the lock `covers`. A live process's lock is waited for,
    never taken; the lock of a dead process is free (the kernel releases it), and what it left half-written is removed. Where the file
    system has no such locks there is none: a file that only lies there would tell nothing of whether its process lives."""
    path = _named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=min(SILENT_WAIT_S, wait_s))
        except Timeout:
            if wait_s > SILENT_WAIT_S:
                print(f"waiting for another process writing {path}", file=sys.stderr, flush=True)
            lock.acquire(timeout=max(wait_s - SILENT_WAIT_S, 0))
    except Timeout as error:
        raise OSError(errno.EAGAIN, "another process is still writing it", str(path)) from error
    except OSError as error:
        if error.errno not in OF_NO_LOCKS:
            raise
        raise OSError(error.errno, f"the file system of this folder has no locks ({os.strerror(error.errno)}), and two processes could "
                      "write at once; put the output on one that has", str(path.parent)) from error
    try:
        for output in (path, *covers):
            _clear_leftovers(_named(output))
            _clear_leftovers(done_path(output))
        yield
    finally:
        lock.release()


def is_leftover(path: Path, names: str = ".+") -> bool:
    """Whether a process left this behind of a file or folder whose name fits the regular expression `names`. What is only called alike,
    `gex.h5ad.tmp.mine` or a file `vocab.txt.old.1` (we replace folders alone in that way), is its user's."""
    match = LEFTOVER.fullmatch(path.name)      # `gex.h5ad.tmp.7.tmp.7`, too: staged with others, and written by the rule of one file
    return match is not None and re.fullmatch(names, match[1]) is not None and (match[2] == "tmp" or path.is_dir())


def clear_leftovers_in(folder: Path | str) -> None:
    """Remove what killed processes left half-written among the files and folders of `folder`, whose lock the caller holds."""
    for name in {re.sub(UNFINISHED, "", path.name) for path in Path(folder).glob("*") if is_leftover(path)}:
        _clear_leftovers(Path(folder) / name)


def _clear_leftovers(path: Path) -> None:
    """Remove temporaries of killed processes; put back a folder that was killed between its two renames."""
    for kind in ("tmp", "old"):
        for left in path.parent.glob(f"{glob.escape(path.name)}.{kind}.*"):
            if not is_leftover(left, re.escape(path.name)):
                continue
            if kind == "old" and ".tmp." not in left.name[len(path.name):] and not path.exists():
                os.rename(left, path)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
