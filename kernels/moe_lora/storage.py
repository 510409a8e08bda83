"""The one writer for what must last, and the reader that refuses or passes over what is not whole.

A writer fills a staged folder. `commit` syncs its files, lists their sizes and SHA-256 in `manifest.json`, and moves
the folder to its place by one rename; until then readers see what was there before. If the place exists already (a
folder that is saved again, or that holds other files too), the rename goes to `.next` inside it, and the files move on
from there; a reader that finds a `.next` reads that, so a kill between two of those files mixes nothing.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

MANIFEST = "manifest.json"
LOCK = ".lock"
_NEXT, _DONE = ".next", ".done"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left", "PytorchStreamWriter", "unexpected pos", "iostream error")  # of safetensors and torch


class DamagedError(ValueError):
    """A folder is not whole: a file is missing, or not the one that was written."""


class DiskFullError(OSError):
    """No space is left; what was saved before is untouched."""


class BusyError(OSError):
    """Another process works in the folder."""


@dataclass(frozen=True)
class Manifest:
    """What a folder must hold.

    files: name → (bytes, SHA-256 in hexadecimal); notes: what the writer said about it, JSON values.
    """

    files: dict[str, tuple[int, str]]
    notes: dict[str, Any]

    def text(self) -> str:
        """The JSON file, which ends with a digest of itself."""
        body = {"files": self.files, "notes": self.notes}
        return json.dumps(body | {"digest": _digest(body)}, indent=1, sort_keys=True) + "\n"


@contextlib.contextmanager
def staged(folder: str | os.PathLike, notes: dict[str, Any] | None = None) -> Iterator[Path]:
    """Give a block an empty folder to write into; commit it to `folder` when the block ends, drop it when it fails.

    Args:
        folder: made if it is not there; files of other names in it stay.
        notes: JSON values for the manifest.
    Raises:
        DiskFullError: no space is left.
    """
    folder = Path(folder)
    place = folder if folder.is_dir() else folder.parent
    draft = place / f".{folder.name}.{os.getpid()}.staged"
    with disk_errors(folder):
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            commit(draft, folder, notes)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def commit(draft: Path, folder: Path, notes: dict[str, Any] | None = None) -> None:
    """Seal a staged folder and move it to its place, by one rename; files that an earlier one has alone stay."""
    if not folder.exists():
        seal(draft, notes)
        os.rename(draft, folder)
        _sync(folder.parent)
        return
    _move_on(folder)  # what an earlier writer committed and could not move
    with contextlib.suppress(DamagedError):  # nothing is kept of a folder that is not whole
        for name in read_manifest(folder).files:
            if not (draft / name).exists():
                check(folder, (name,))
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                _link(folder / name, draft / name)
    seal(draft, notes)
    os.rename(draft, folder / _NEXT)
    _sync(folder)
    _move_on(folder)


def seal(folder: str | os.PathLike, notes: dict[str, Any] | None = None) -> None:
    """Write the manifest of the files in a folder as they are, and sync all of them to the disk."""
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and str(name) != MANIFEST:
            _sync(path)
            files[name.as_posix()] = (path.stat().st_size, _hash(path))
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(Manifest(files, notes or {}).text())
        file.flush()
        os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def check(folder: str | os.PathLike, names: Iterable[str] | None = None) -> Path:
    """Compare the files of a folder with its manifest.

    Args:
        folder: what `staged` wrote.
        names: files that must be there and are compared; all of the manifest when None.
    Returns:
        The folder to read them from: `folder`, or its `.next` where a writer was killed after the commit.
    Raises:
        DamagedError: the manifest or a file is missing or damaged.
    """
    folder = whole(folder)
    manifest = read_manifest(folder)
    for name in manifest.files if names is None else names:
        path = folder / name
        if name not in manifest.files:
            raise DamagedError(f"{path} must be in {MANIFEST}, got only {sorted(manifest.files)}")
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        size, digest = manifest.files[name]
        if path.stat().st_size != size:
            raise DamagedError(f"{path} must have {size} bytes, got {path.stat().st_size}: it is cut or replaced")
        if _hash(path) != digest:
            raise DamagedError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return folder


def whole(folder: str | os.PathLike) -> Path:
    """The folder itself, or its `.next` where a writer was killed before its files were in their place."""
    folder = Path(folder)
    return folder / _NEXT if (folder / _NEXT).is_dir() else folder


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        DamagedError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digest = values.pop("digest")
        files = {name: (size, sha) for name, (size, sha) in values["files"].items()}
        notes = values["notes"]
    except FileNotFoundError as error:
        raise DamagedError(
            f"{path} is missing, so nobody can tell whether the folder is whole; if you trust its files, "
            "moe_lora.storage.seal(folder) writes one"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if digest != _digest(values):
        raise DamagedError(f"{path} is damaged: its digest is not that of its contents")
    return Manifest(files, notes)


def newest(folder: str | os.PathLike, prefix: str) -> tuple[Path | None, list[str]]:
    """Find the newest whole one of the folders PREFIX-NUMBER.

    Returns:
        the folder, None if there is none at all; and for each newer one that was passed over, the reason.
    Raises:
        DamagedError: there are some, and none is whole.
    """
    numbered = {}
    for path in Path(folder).glob(f"{prefix}-*"):
        number = path.name.removeprefix(f"{prefix}-")
        if path.is_dir() and number.isdecimal():
            numbered[int(number)] = path
    passed = []
    for number in sorted(numbered, reverse=True):
        try:
            return check(numbered[number]), passed
        except DamagedError as error:
            passed.append(str(error))
    if passed:
        raise DamagedError(f"{folder} has no whole {prefix}: {'; '.join(passed)}")
    return None, passed


def write_file(path: str | os.PathLike, data: str | bytes) -> None:
    """Write one file: it is replaced whole, and on the disk when the function returns, or it stays as it was."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.staged")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder so that no reader sees half of it."""
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.gone")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder for this process; the system drops the lock when the process ends, however it ends.

    What killed writers left half-written in it is removed.

    Raises:
        BusyError: another process holds it.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (closed below)
    with stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(
                    f"{folder} is in use by another process that still runs; wait for it or give another folder"
                ) from error
        for pattern in (".*.staged", ".*.gone"):
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn what a full disk makes of writes, torch.save and safetensors into one DiskFullError that names `path`."""
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if not full and not any(text in str(error) for text in _FULL_TEXTS):
            raise
        raise DiskFullError(
            errno.ENOSPC, f"{path} could not be written, the disk is full; what was saved before is whole"
        ) from error


def _move_on(folder: Path) -> None:
    """Put the files of `.next`, if there is one, in their place."""
    ready = folder / _NEXT
    if not ready.is_dir():
        return
    names = [*read_manifest(ready).files, MANIFEST]
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}.staged")
        draft.unlink(missing_ok=True)
        _link(ready / name, draft)
        os.replace(draft, target)
    for parent in {(folder / name).parent for name in names}:
        _sync(parent)
    shutil.rmtree(folder / _DONE, ignore_errors=True)
    os.rename(ready, folder / _DONE)
    _sync(folder)
    shutil.rmtree(folder / _DONE, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        _sync(target)


def _sync(path: Path) -> None:
    """Have the disk hold a file's data, or a folder's entries."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
