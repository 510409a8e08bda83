"""`storage`: a writer that is killed at any point, and a reader that never takes half of what it wrote."""

import builtins
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_lora import storage
from safetensors.torch import save_file

OLD = {"a.bin": b"old a" * 100, "kept.txt": b"only the old one has this"}
NEW = {"a.bin": b"new a" * 200, "deep/c.bin": bytes(range(256)) * 3}


def write(folder, files, notes=None):
    with storage.staged(folder, notes) as draft:
        for name, data in files.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(data)


def read(folder):
    """The files of a folder by its manifest, checked."""
    place = storage.check(folder)
    return {name: (place / name).read_bytes() for name in storage.read_manifest(place).files}


class Crash:
    """Ends the process, as a kill does, when `point` operations on the disk have begun; notes which files are synced.

    A write is two operations, so that one point lies in its middle.
    """

    def __init__(self, point, synced):
        self.point, self.count, self.synced = point, 0, synced

    def step(self):
        if self.count == self.point:
            os._exit(9)
        self.count += 1

    def install(self):
        for name in ("fsync", "rename", "replace", "link"):
            setattr(storage.os, name, self.around(getattr(os, name), name == "fsync"))
        storage.open = self.open

    def around(self, function, syncs):
        def call(*arguments):
            self.step()
            result = function(*arguments)
            if syncs:
                status = os.fstat(arguments[0])
                with builtins.open(self.synced, "a") as log:
                    log.write(f"{status.st_ino} {status.st_size}\n")
            self.step()
            return result

        return call

    def open(self, path, mode="r", **options):
        file = builtins.open(path, mode, **options)  # noqa: SIM115  (what `open` returns)
        if "w" in mode:
            inner = file.write

            def halves(data):
                inner(data[: len(data) // 2])
                file.flush()
                self.step()
                inner(data[len(data) // 2 :])
                self.step()

            file.write = halves
        return file


def run_killed(action, point, synced):
    """Run `action` in a child that is killed at `point`. Returns: whether it was killed."""
    if (child := os.fork()) == 0:
        try:
            Crash(point, synced).install()
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def lose_power(folder, synced):
    """Cut the files that were never synced at their present size: what a disk may hold after a power failure."""
    safe = {tuple(map(int, line.split())) for line in synced.read_text().splitlines()}
    for path in folder.rglob("*"):
        status = path.stat()
        if path.is_file() and (status.st_ino, status.st_size) not in safe:
            os.truncate(path, status.st_size // 2)


@pytest.mark.parametrize("power", [pytest.param(False, marks=pytest.mark.slow), True], ids=["kill", "power"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path, exists, power):
    seen, point, killed = set(), 0, True
    new = OLD | NEW if exists else NEW
    while killed:
        root, synced = tmp_path / str(point), tmp_path / f"{point}.log"
        root.mkdir()
        synced.write_text("")
        if exists:
            assert not run_killed(lambda root=root: write(root / "set", OLD), -1, synced)
            (root / "set/other").write_text("of somebody else")
            with synced.open("a") as log:
                log.write(f"{(root / 'set/other').stat().st_ino} 16\n")
        killed = run_killed(lambda root=root: write(root / "set", NEW), point, synced)
        if power:
            lose_power(root, synced)
        if exists or (root / "set").exists():
            content = read(root / "set")
            seen.add("old" if content == OLD else "new")
            assert content in (OLD, new)
            assert not exists or (root / "set/other").read_text() == "of somebody else"
            assert killed or content == new
        else:
            assert killed
            seen.add("none")
        write(root / "set", NEW, {"again": 1})
        assert read(root / "set") == new
        assert not list((root / "set").glob(".next"))
        point += 1
    assert seen == ({"old", "new"} if exists else {"none", "new"}) and point > 15


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_a_file_is_the_old_or_the_new_one_after_any_crash(tmp_path, power):
    seen, point, killed = set(), 0, True
    while killed:
        path, synced = tmp_path / str(point) / "metrics.json", tmp_path / f"{point}.log"
        synced.write_text("")
        assert not run_killed(lambda path=path: storage.write_file(path, "old"), -1, synced)
        killed = run_killed(lambda path=path: storage.write_file(path, b"the new one"), point, synced)
        if power:
            lose_power(path.parent, synced)
        assert path.read_text() in ("old", "the new one") and (killed or path.read_text() == "the new one")
        seen.add(path.read_text())
        point += 1
    assert len(seen) == 2


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_the_last_rename_is_synced_before_staged_returns(tmp_path, monkeypatch, exists):
    if exists:
        write(tmp_path / "set", OLD)
    events = []
    for name in ("rename", "replace", "fsync"):
        function = getattr(os, name)

        def call(*arguments, name=name, function=function):
            known = os.fstat(arguments[0]).st_ino if name == "fsync" else str(arguments[1])
            events.append((name, known))
            return function(*arguments)

        monkeypatch.setattr(storage.os, name, call)
    write(tmp_path / "set", NEW)
    renames = [index for index, (name, _) in enumerate(events) if name != "fsync"]
    for index in renames:
        parent = Path(events[index][1]).parent.stat().st_ino
        assert ("fsync", parent) in events[index:], events[index]


@pytest.mark.parametrize("name", [*NEW, storage.MANIFEST])
@pytest.mark.parametrize("how", ["delete", "cut", "grow", "flip first", "flip last"])
def test_damage_is_named(tmp_path, name, how):
    write(tmp_path / "set", NEW, {"step": 3})
    path = tmp_path / "set" / name
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how.startswith("flip"):
        data[0 if "first" in how else -2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-2] if how == "cut" else data + b"x")
    with pytest.raises(storage.DamagedError, match=name):
        storage.check(tmp_path / "set")


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_no_flip_in_the_manifest_passes(tmp_path, position):
    write(tmp_path / "set", {"a": b"1"}, {"step": 3, "text": "abc"})
    path = tmp_path / "set" / storage.MANIFEST
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << position % 7
    path.write_bytes(data)
    before = json.loads(path.read_bytes().decode(errors="replace")) if is_json(path) else None
    try:
        manifest = storage.read_manifest(tmp_path / "set")
    except storage.DamagedError:
        return
    assert manifest.notes == {"step": 3, "text": "abc"} and before  # a flip in white space


def is_json(path):
    try:
        json.loads(path.read_bytes().decode(errors="replace"))
    except ValueError:
        return False
    return True


def test_check_of_some_names_leaves_the_others_alone(tmp_path):
    write(tmp_path / "set", NEW)
    (tmp_path / "set/deep/c.bin").unlink()
    assert storage.check(tmp_path / "set", ["a.bin"]) == tmp_path / "set"
    with pytest.raises(storage.DamagedError, match=r"x\.bin must be in manifest\.json"):
        storage.check(tmp_path / "set", ["x.bin"])


def test_a_failing_block_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), storage.staged(tmp_path / "set"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_newest_whole_is_taken_and_the_others_are_named(tmp_path):
    assert storage.newest(tmp_path, "checkpoint") == (None, [])
    for number in (2, 9, 10):
        write(tmp_path / f"checkpoint-{number}", NEW)
    (tmp_path / "checkpoint-best").mkdir()
    assert storage.newest(tmp_path, "checkpoint") == (tmp_path / "checkpoint-10", [])
    (tmp_path / "checkpoint-10/a.bin").unlink()
    (tmp_path / "checkpoint-9/manifest.json").unlink()
    place, passed = storage.newest(tmp_path, "checkpoint")
    assert place == tmp_path / "checkpoint-2" and len(passed) == 2
    assert "checkpoint-10/a.bin is missing" in passed[0] and "checkpoint-9/manifest.json is missing" in passed[1]
    os.truncate(tmp_path / "checkpoint-2/deep/c.bin", 3)
    with pytest.raises(storage.DamagedError, match=r"no whole checkpoint: .*a\.bin.*manifest\.json.*c\.bin"):
        storage.newest(tmp_path, "checkpoint")


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    code = (
        "import sys, time\nfrom moe_lora import storage\n"
        "with storage.lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        with pytest.raises(storage.BusyError, match="in use by another process"), storage.lock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    (tmp_path / ".checkpoint-3.77.staged").mkdir()
    with storage.lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [storage.LOCK]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of a given size; as root alone."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size):
        if os.path.ismount(place):
            subprocess.run(["umount", str(place)], check=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def torch_file(path):
    torch.save({"x": torch.ones(9000)}, path)


def safetensors_file(path):
    save_file({"x": torch.ones(9000)}, path)


@pytest.mark.parametrize("writer", [torch_file, safetensors_file, lambda path: path.write_bytes(b"x" * 36_000)])
def test_a_full_disk_is_one_error_and_keeps_the_old(small_disk, writer):
    """Every size from too small to large enough, in pages."""
    outcomes = []
    for pages in range(3, 40):
        root = small_disk(pages * 4096)
        write(root / "set", {"old": b"whole"})
        try:
            with storage.staged(root / "set") as draft:
                writer(draft / "big")
                writer(draft / "second")
        except storage.DiskFullError as error:
            assert error.errno == errno.ENOSPC and "\n" not in str(error) and "the disk is full" in str(error)
            assert read(root / "set") == {"old": b"whole"}
            assert [path.name for path in root.iterdir()] == ["set"]
            outcomes.append(False)
        else:
            assert set(read(root / "set")) == {"big", "second", "old"}
            outcomes.append(True)
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}


def test_a_discarded_folder_goes(tmp_path):
    write(tmp_path / "set", NEW)
    storage.discard(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_folders_move_with_what_they_hold(tmp_path):
    write(tmp_path / "set", NEW)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert read(tmp_path / "copy") == NEW


def test_a_damaged_file_that_would_stay_is_not_sealed_again(tmp_path):
    write(tmp_path / "set", OLD)
    (tmp_path / "set/kept.txt").write_bytes(b"damaged")
    write(tmp_path / "set", NEW)
    assert read(tmp_path / "set") == NEW
