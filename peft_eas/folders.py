"""Folders and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .runtime.eas_files import SCRATCH


@contextlib.contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the `with` ends; if it ends in an exception, nothing is left.

    Args:
        target: Where the folder is wanted: a name that is free, or an empty folder.

    Raises:
        ValueError: if `target` is something else.
    """
    target = _free(target)
    # beside the target, so that the last step is one renaming
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        folder.replace(target)


@contextlib.contextmanager
def kept_folder(target: str | os.PathLike) -> Iterator[tuple[Path, Path]]:
    """As `new_folder`, with another folder beside it: what is put there is still there the next time, if the `with` was
    interrupted or the process killed. A `ValueError` would come again, and leaves nothing.

    Returns:
        The folder whose content is kept, and the one to fill.

    Raises:
        ValueError: as `new_folder`; and if another process has them.
    """
    target = _free(target)
    scratch = target.parent / f".{target.name}.merging"
    kept, folder = scratch / "kept", scratch / "new"
    kept.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(scratch / "lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield kept, folder
            folder.replace(target)
    except Timeout:
        raise ValueError(f"Another process is writing {target}: wait for it, or name another folder.") from None
    except ValueError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _free(target: str | os.PathLike) -> Path:
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already and is not an empty folder: name another one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


@contextlib.contextmanager
def new_file(target: str | os.PathLike) -> Iterator[Path]:
    """A file to write, which takes the place of `target` when the `with` ends; if it ends in an exception, all is as it
    was, and nothing else is left."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # by a name that the next save of a model clears away, if this one is killed
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=SCRATCH) as scratch:
        file = Path(scratch) / target.name
        yield file
        file.replace(target)
