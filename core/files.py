"""Output files: refused before the work when they cannot be written, and written whole or not at all."""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

PathLike = str | os.PathLike[str]


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


@contextmanager
def write_beside(path: PathLike) -> Iterator[pathlib.Path]:
    """Yield a new file beside `path`, which replaces `path` at the end of the block.

    After an error it is deleted, and what was at `path` is unchanged. Links are followed, and the permissions of an older
    file are kept. Raises OSError when the file cannot be made.
    """
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target  # a device or a pipe
        return
    # The same suffix, because writers choose their format by it; a short name, because the full one may be as long as allowed.
    beside = target.with_name(f".{secrets.token_hex(6)}.part{target.suffix}")
    with naming(path):
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield beside
            with suppress(FileNotFoundError):
                os.chmod(beside, target.stat().st_mode & 0o777)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Turn an OSError of the block into one that names the file that a user asked for, not the one beside it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UnwrittenError):
            raise
        reason = error.strerror or str(error).splitlines()[0]
        raise UnwrittenError(f"Could not write {path} ({reason}). What was there before is unchanged.") from error


class UnwrittenError(OSError):
    """A file could not be written; what was at its place before still is."""
