"""Output files: refused before the work when they cannot be written, and written whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | os.PathLike[str]
HIDDEN = re.compile(r"\.part-[0-9a-f]{12}(\.[^.]*)?")  # what a process that was killed leaves behind
ABANDONED = 24 * 3600.0  # seconds without a write


def check_output(name: str, path: PathLike, suffixes: Collection[str] = ()) -> pathlib.Path:
    """Return `path` with ~ expanded; raises ValueError unless a file can be written there, with one of `suffixes` if given."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"Expected `{name}` to be a file, but {path} is a folder. Add a file name.")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(
            f"Expected `{name}` to end in {', '.join(suffixes)}, but got {path.name!r}. Choose another name."
        )
    check_folder(name, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"Expected `{name}` to be a file that can be written, but {path} is read-only.")
    return path


def check_folder(name: str, folder: pathlib.Path) -> None:
    """Raise ValueError unless `folder` exists and files can be made in it."""
    if not folder.is_dir():
        raise ValueError(f"Expected `{name}` in an existing folder, but there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"Expected `{name}` in a folder that can be written, but {folder} cannot. Choose another.")


class Draft:
    """A new file beside `path`, until `replace`, `settle` or `discard` ends it. Links of `path` are followed, `file` is none.

    A `visible` one carries the name of `path`, so that a user finds it when the process was killed. A device or a pipe is
    written in place. Raises OSError when the file cannot be made.
    """

    def __init__(self, path: PathLike, visible: bool = False) -> None:
        self.path = pathlib.Path(path)
        self.target = pathlib.Path(os.path.realpath(path))
        self.in_place = self.target.exists() and not self.target.is_file()
        if self.in_place:
            self.file = self.target
            return
        # The same suffix, because writers choose their format by it; a short name, because the full one may be as long as allowed.
        shown = f"{self.target.stem[:50]}.part-" if visible else ".part-"
        self.file = self.target.with_name(f"{shown}{secrets.token_hex(6)}{self.target.suffix}")
        _sweep(self.target.parent)
        with naming(path):
            os.close(os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))

    def replace(self) -> None:
        """Put the file at `path`, with the permissions of an older one."""
        if self.in_place:
            return
        with suppress(FileNotFoundError):
            os.chmod(self.file, self.target.stat().st_mode & 0o777)
        os.replace(self.file, self.target)

    def settle(self, whole: bool) -> pathlib.Path:
        """Put a whole file at `path`, one that is not whole only if nothing is there; return where it is then."""
        if self.in_place or (not whole and os.path.lexists(self.target)):
            return self.file
        self.replace()
        return self.path

    def discard(self) -> None:
        if not self.in_place:
            self.file.unlink(missing_ok=True)


@functools.cache
def _sweep(folder: pathlib.Path) -> None:
    """Delete what killed processes left in a folder, once per folder: it may hold very many files."""
    with suppress(OSError):
        for file in folder.iterdir():
            if HIDDEN.fullmatch(file.name) and file.lstat().st_mtime < time.time() - ABANDONED:
                with suppress(OSError):
                    file.unlink()


def stamp(*files: PathLike) -> str:
    """Return a digest that changes when one of `files` is added, left out or replaced: path, size and time of each."""
    digest = hashlib.sha256()
    for file in map(pathlib.Path, files):
        stat = file.stat()
        digest.update(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|".encode())
    return digest.hexdigest()


@contextmanager
def write_beside(path: PathLike) -> Iterator[pathlib.Path]:
    """Yield a new file beside `path`, which replaces `path` at the end of the block.

    After an error it is deleted, and what was at `path` is unchanged. Links are followed, and the permissions of an older
    file are kept. Raises OSError when the file cannot be made.
    """
    draft = Draft(path)
    with naming(path):
        try:
            yield draft.file
            draft.replace()
        finally:
            draft.discard()


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Turn an OSError of the block into one that names the file that a user asked for, not the one beside it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UnwrittenError):
            raise
        raise unwritten(path, error) from error


def save_tensors(tensors: Mapping[str, Tensor], file: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file; raises OSError, where the library has an error of its own, when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{error}") from error


def unwritten(path: PathLike, error: OSError) -> UnwrittenError:
    """Return the error of a failed write, which names the file that a user asked for."""
    reason = error.strerror or str(error).splitlines()[0]
    return UnwrittenError(f"Could not write {path} ({reason}). What was there before is unchanged.")


class UnwrittenError(OSError):
    """A file could not be written; what was at its place before still is."""
