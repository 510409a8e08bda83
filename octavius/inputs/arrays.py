"""Arrays of numbers in .npy and .npz files; one that claims more than its file holds is refused before it is read."""

import io
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
from numpy.lib import format as npy

BROKEN = (  # what numpy raises on files that are cut short or no arrays
    OSError, EOFError, ValueError, TypeError, KeyError, SyntaxError, MemoryError, OverflowError, RecursionError,
    TokenError,
)  # fmt: skip


def read_array(path: str | Path, data: bytes | None = None) -> np.ndarray:
    """The array of an .npy file; objects are refused.

    Args:
        path: of the file.
        data: what the file holds; None reads it.
    Raises:
        ValueError: no such file, a broken header, or fewer bytes than the header claims.
    """
    path = Path(path)
    try:
        with path.open("rb") if data is None else io.BytesIO(data) as stream:
            _check_claim(stream, path.stat().st_size if data is None else len(data))
            stream.seek(0)
            return np.load(stream, allow_pickle=False)
    except BROKEN as error:
        raise ValueError(f"{path}: cannot be read as an array: {_line(error)}") from error


def read_arrays(path: str | Path, names: Iterable[str], data: bytes | None = None) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz file holds; objects are refused.

    Args:
        path: of the file.
        names: of the arrays.
        data: what the file holds; None reads it.
    Raises:
        ValueError: no such file, no .npz file, or an array as `read_array` refuses it.
    """
    try:
        with zipfile.ZipFile(path if data is None else io.BytesIO(data)) as archive:
            held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            arrays = {}
            for name in names:
                if name in held:
                    with archive.open(held[name]) as stream:
                        _check_claim(stream, held[name].file_size)
                    with archive.open(held[name]) as stream:
                        arrays[name] = np.load(io.BytesIO(stream.read()), allow_pickle=False)
            return arrays
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, *BROKEN) as error:
        raise ValueError(f"{path}: cannot be read as arrays: {_line(error)}") from error


def _check_claim(stream: IO[bytes], size: int) -> None:
    """Raise ValueError unless a stream of `size` bytes holds as many numbers as its header claims."""
    version = npy.read_magic(stream)  # type: ignore[arg-type]
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its format version must be 1.0 or 2.0, got {version[0]}.{version[1]}")
    shape, _, dtype = read(stream)  # type: ignore[arg-type]
    claimed = math.prod(shape) * dtype.itemsize
    if min((0, *shape)) < 0 or claimed > size:
        raise ValueError(f"its header claims {list(shape)} {dtype}, {claimed} bytes, and the file has {size}")


def _line(error: BaseException) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
