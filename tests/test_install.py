"""The source tree installs: wheels, metadata and extras; with a compiler, without one, on every Python here."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = ("kernels", "octavius", "csrc", "tests", "docs", "benchmarks", "tools", "examples")
FILES = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt"),
    *("mkdocs.yml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
)
DATA = """
from importlib.resources import files
import moe_lora, octavius
from octavius.config import PRESETS, load_config
for package in (moe_lora, octavius):
    print(package.__file__)
print(*sorted(path.stem for path in PRESETS.glob("*.yaml")))
print(load_config("demo").model.lora.num_experts, (files("octavius") / "report/report.html.jinja").is_file())
"""
BACKEND = """
import sys, warnings
# an editable installation in this environment would lend its own moe_lora._C
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import moe_lora
text = [str(entry.message) for entry in caught if "native CPU kernels" in str(entry.message)]
print(repr((moe_lora.__version__, moe_lora.backends()["cpu"], text)))
"""
NATIVE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("moe_lora._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.INTERFACE, module.threads(1), module.instructions())
"""


def run(command, cwd, expect=0, **variables):
    """Run a command outside the tree and return what it printed on stdout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MOE_LORA_BUILD")}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment | variables, timeout=1500
    )
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def pip(*arguments, python=sys.executable):
    return [python, "-m", "pip", "--disable-pip-version-check", *arguments]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, so that no build touches the tree."""
    folder = tmp_path_factory.mktemp("tree")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "*.so", "_build.txt")
    for name in TREE:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def install(tree, site, **variables):
    """Install the tree into a folder without network and without build isolation."""
    command = pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, tree)
    run(command, site.parent, **variables)
    return site


@pytest.fixture(scope="module")
def site(tree, tmp_path_factory):
    """Where the tree is installed without native kernels, as was asked for."""
    return install(tree, tmp_path_factory.mktemp("none") / "site", MOE_LORA_BUILD="none")


@pytest.fixture(scope="module")
def bare(tree, tmp_path_factory):
    """Where the tree is installed on a machine without a compiler."""
    absent = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    return install(tree, tmp_path_factory.mktemp("bare") / "site", **absent)


def test_installed_packages_bring_their_data(site):
    engine, model, presets, rest = run([sys.executable, "-c", DATA], site.parent, PYTHONPATH=str(site)).splitlines()
    assert Path(engine) == site / "moe_lora/__init__.py" and Path(model) == site / "octavius/__init__.py"
    assert presets.split() == sorted(path.stem for path in (ROOT / "octavius/configs").glob("*.yaml"))
    assert rest == "6 True"


def test_every_module_and_data_file_is_installed(site):
    for package, root in (("moe_lora", ROOT / "kernels"), ("octavius", ROOT)):
        for suffix in ("py", "yaml", "jinja", "typed", "html", "css", "js", "svg"):
            expected = {path.relative_to(root) for path in (root / package).rglob(f"*.{suffix}")}
            assert expected == {path.relative_to(site) for path in (site / package).rglob(f"*.{suffix}")}, suffix


def test_nothing_else_is_installed(site):
    """Not `kernels`, which is Hugging Face's name, and no tests or benchmarks."""
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"bin"} == {"moe_lora", "octavius"}


def test_metadata(site):
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    metadata = distribution.metadata
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata.get_all("Classifier")
    assert f'__version__ = "{metadata["Version"]}"' in (ROOT / "kernels/moe_lora/__init__.py").read_text()
    assert "moe_lora" in str(metadata.get_payload()), "the README is the long description"
    required = {text for text in distribution.requires or () if "extra ==" not in text}
    assert {text.partition(">")[0] for text in required} == {"torch", "safetensors"}
    assert set(metadata.get_all("Provides-Extra")) == {"octavius", "serve", "train", "gpu", "docs", "dev"}
    (command,) = distribution.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("octavius", "octavius.__main__:main")


def test_every_dependency_is_pinned():
    def normal(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    assert {normal(re.match(r"[\w.-]+", text)[0]) for text in names} <= pinned


def test_left_out_kernels_are_named_without_a_warning(site):
    _, reason, texts = ast.literal_eval(run([sys.executable, "-c", BACKEND], site.parent, PYTHONPATH=str(site)))
    assert "MOE_LORA_BUILD=none left the native kernels out" in reason and texts == []


def test_without_a_compiler_one_warning_says_what_is_missing_and_what_to_type(bare, tree):
    _, reason, (text,) = ast.literal_eval(run([sys.executable, "-c", BACKEND], bare.parent, PYTHONPATH=str(bare)))
    assert reason in text and "no C++ compiler: /nonexistent/c++ was not found" in reason
    assert "apt install g++" in reason and reason.endswith(f"--force-reinstall --no-deps {tree}")
    call = "import torch; from moe_lora.verify import Case, make; "
    call += "print(moe_lora.linear(*make(Case((3,), 4, 5, 2, 1, 2), torch.float32)[:6]).shape)"
    assert "[1, 3, 5]" in run([sys.executable, "-c", f"{BACKEND}{call}"], bare.parent, PYTHONPATH=str(bare))


def test_build_modes_that_cannot_be_kept_fail(tree, tmp_path):
    absent = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    run(command, tree, expect=1, MOE_LORA_BUILD="cpu", **absent)
    run(command, tree, expect=1, MOE_LORA_BUILD="gpu")
    run(command, tree, **absent)
    assert "no C++ compiler" in (tmp_path / "moe_lora/_build.txt").read_text()


def test_native_sources_include_no_header_of_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text()), path


# From here on with a compiler, build isolation and a package index.


def pythons():
    """Every Python from 3.11 on that this machine offers."""
    found = {}
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = [Path(sys.base_prefix) / "bin/python3", *sorted(root.glob("versions/*/bin/python3"))]
    paths += [Path(path) for minor in range(11, 20) if (path := shutil.which(f"python3.{minor}"))]
    code = "import sys; print(*sys.version_info[:2])"
    for path in filter(Path.exists, paths):
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and (version := tuple(map(int, done.stdout.split()))) >= (3, 11):
            found.setdefault(version, path)
    return found


PYTHONS = pythons()
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler here"
)


def environment(folder, python, *paths):
    """A fresh virtual environment that also sees these folders of packages."""
    run([python, "-m", "venv", folder / "venv"], folder)
    own = folder / "venv/bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([own, "-c", code], folder).strip())
    (packages / "torch.pth").write_text("".join(f"{path}\n" for path in paths))
    return own


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """Built in isolation: nothing of this environment, torch among it, can be seen."""
    folder = tmp_path_factory.mktemp("wheel")
    run(pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, tree), folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("version", PYTHONS, ids=lambda version: "{}.{}".format(*version))
def test_fresh_environment_gets_native_kernels(tree, tmp_path, version):
    """Without a flag and without torch in the build; where torch is to be had, the backend runs."""
    same = version == sys.version_info[:2]
    python = environment(tmp_path, PYTHONS[version], *([sysconfig.get_path("purelib")] if same else []))
    run(pip("install", "--quiet", "--no-deps", tree, python=python), tmp_path)
    (file,) = (tmp_path / "venv").rglob("moe_lora/_C*.so")
    number, threads, _ = run([python, "-c", NATIVE, file], tmp_path).split()
    assert (number, threads) == ("2", "1")
    if same:
        _, reason, texts = ast.literal_eval(run([python, "-c", BACKEND], tmp_path))
        assert (reason is None or "instruction sets" in reason) and texts == []


@pytest.mark.slow
@needs_compiler
def test_the_advised_command_mends_an_installation_without_kernels(tree, tmp_path):
    python = environment(tmp_path, PYTHONS[sys.version_info[:2]], sysconfig.get_path("purelib"))
    absent = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    run(pip("install", "--quiet", "--no-deps", tree, python=python), tmp_path, **absent)
    _, reason, (_,) = ast.literal_eval(run([python, "-c", BACKEND], tmp_path))
    run(["bash", "-c", reason.partition("then run: ")[2]], tmp_path)
    _, reason, texts = ast.literal_eval(run([python, "-c", BACKEND], tmp_path))
    assert (reason is None or "instruction sets" in reason) and texts == []


@pytest.mark.slow
@needs_compiler
def test_sdist_is_whole_checks_clean_and_installs(tree, tmp_path):
    pytest.importorskip("build", reason="the dev extra's build is not installed")
    run([sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, tree], tmp_path)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "tests/test_install.py",
        "docs/gpu.md",
        "Makefile",
        "csrc/cpu/moe_lora.h",
        "tools/ptxemu/pyproject.toml",
    ):
        assert name in names
    run([sys.executable, "-m", "twine", "check", "--strict", file], tmp_path)
    python = environment(tmp_path, PYTHONS[sys.version_info[:2]], sysconfig.get_path("purelib"))
    run(pip("install", "--quiet", "--no-deps", file, python=python), tmp_path)
    _, reason, texts = ast.literal_eval(run([python, "-c", BACKEND], tmp_path))
    assert (reason is None or "instruction sets" in reason) and texts == []


@pytest.mark.slow
@needs_compiler
def test_wheel_links_nothing_of_torch_and_has_a_manylinux_tag(wheel, tmp_path):
    pytest.importorskip("auditwheel", reason="the dev extra's auditwheel is not installed")
    run([sys.executable, "-m", "twine", "check", "--strict", wheel], tmp_path)
    shown = run([sys.executable, "-m", "auditwheel", "show", wheel], tmp_path)
    assert re.search(r'platform\s+tag:\s+"manylinux_2_\d+_', shown) and "torch" not in shown and "gomp" not in shown


@pytest.mark.slow
@needs_compiler
def test_same_wheel_runs_with_another_torch(wheel, tmp_path):
    """MOE_LORA_OTHER_TORCH names a folder that `pip install --target` filled with another version."""
    other = os.environ.get("MOE_LORA_OTHER_TORCH")
    if not other:
        pytest.skip("a second torch takes 5 GB: name its folder in MOE_LORA_OTHER_TORCH to run this")
    code = (
        "import torch, moe_lora; from moe_lora.backend import cpu; torch.set_num_threads(2)\n"
        "from moe_lora.verify import Case, make; i = make(Case((91, 91), 70, 130, 4, 2, 32), torch.bfloat16)\n"
        "y, r = (moe_lora.linear(*i[:6], backend=name) for name in ('cpu', 'reference'))\n"
        "print(torch.__version__, cpu.threads(), (y - r).abs().max().item() < 0.1)"
    )
    found = []
    for paths in ([sysconfig.get_path("purelib")], [other, sysconfig.get_path("purelib")]):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        python = environment(folder, PYTHONS[sys.version_info[:2]], *paths)
        run(pip("install", "--quiet", "--no-deps", "--no-index", wheel, python=python), folder)
        version, threads, right = run([python, "-c", code], folder).split()
        assert (threads, right) == ("2", "True")
        found.append(version)
    assert found[0] != found[1]
