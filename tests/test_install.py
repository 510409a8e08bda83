"""The source tree installs: both packages, their data files, the command and the metadata."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import sys
from importlib.resources import files
import moe_lora, octavius
from octavius.config import PRESETS, load_config
for package in (moe_lora, octavius):
    print(package.__file__)
print(*sorted(path.stem for path in PRESETS.glob("*.yaml")))
print(load_config("demo").model.lora.num_experts, (files("octavius") / "report/report.html.jinja").is_file())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where a copy of the tree was installed, without network and without touching the tree."""
    folder = tmp_path_factory.mktemp("install")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("kernels", "octavius"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "tree")]
    environment = os.environ | {"MOE_LORA_BUILD": "none"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_installed_packages_bring_their_data(site):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=site.parent,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    engine, model, presets, rest = done.stdout.splitlines()
    assert Path(engine) == site / "moe_lora/__init__.py" and Path(model) == site / "octavius/__init__.py"
    assert presets.split() == sorted(path.stem for path in (ROOT / "octavius/configs").glob("*.yaml"))
    assert rest == "6 True"


def test_every_module_and_data_file_is_installed(site):
    for package, root in (("moe_lora", ROOT / "kernels"), ("octavius", ROOT)):
        for suffix in ("py", "yaml", "jinja"):
            wanted = {path.relative_to(root) for path in (root / package).rglob(f"*.{suffix}")}
            assert wanted == {path.relative_to(site) for path in (site / package).rglob(f"*.{suffix}")}


def test_nothing_else_is_installed(site):
    """Not `kernels`, which is Hugging Face's name, and no tests or benchmarks."""
    names = {path.name for path in site.iterdir() if not path.name.endswith((".dist-info", ".so"))}
    assert names - {"bin"} == {"moe_lora", "octavius"}


def test_metadata(site):
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert found.metadata["Requires-Python"] == ">=3.11" and "Apache-2.0" in found.metadata["License-Expression"]
    required = {text for text in found.requires or () if "extra ==" not in text}
    assert {text.partition(">")[0] for text in required} == {"torch", "safetensors"}
    assert set(found.metadata.get_all("Provides-Extra") or ()) >= {"octavius", "dev"}
    (command,) = found.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("octavius", "octavius.cli:main")
