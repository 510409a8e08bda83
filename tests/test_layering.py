"""The import graph over packages: imports point down, packages on one floor do not see each other."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {  # lowest first
    "moe_lora": (
        ("config", "routing", "dropout", "storage", "weight", "fingerprint"),
        ("gate", "question", "card", "rows"),
        ("backend",),
        ("ops",),
        ("group",),
        ("verify", "slot"),
        ("layers",),
        ("siblings", "context"),
        ("calls",),
        ("inject",),
        ("checkpoint",),
        ("adopt",),
        ("audit", "peft"),
        ("__init__",),
        ("__main__",),
    ),
    "octavius": (
        ("__init__", "inputs", "registry"),
        ("assets", "config"),
        ("vision", "points", "language"),
        ("model", "data"),
        ("training", "evaluation", "report"),
        ("launch", "experiments", "serve", "session", "demo"),
        ("cli",),
        ("__main__",),
    ),
}
ROOTS = {"moe_lora": ROOT / "kernels/moe_lora", "octavius": ROOT / "octavius"}
FILES = [(package, path) for package, root in ROOTS.items() for path in sorted(root.rglob("*.py"))]


def imported(path):
    """Dotted names of what a file imports when it runs, of names from a package too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_point_down(package, path):
    floor = {room: level for level, rooms in enumerate(FLOORS[package]) for room in rooms}
    own = path.relative_to(ROOTS[package]).parts[0].removesuffix(".py")
    for name in imported(path):
        top, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        assert top not in ("kernels", "tests", "benchmarks", "examples"), f"{path} imports {name}"
        if top == package:
            if room == "_C":
                continue
            room = room if room in floor else "__init__"
            assert room == own or floor[room] < floor[own], f"{own} (floor {floor[own]}) imports {name} ({floor[room]})"
        elif package == "moe_lora":
            foreign = "triton" in path.parts and top == "triton"
            assert top in {"torch", "safetensors", *sys.stdlib_module_names} or foreign or own == "peft", name
        elif top == "moe_lora":
            assert rest.count(".") == 0, f"{path} imports {name}, which is not a public name of the engine"


def run(code):
    """A fresh interpreter at the root of the tree, where `kernels` is a namespace that can be imported."""
    path = os.pathsep.join(map(str, (ROOT / "kernels", ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_engine_is_loaded_without_triton_transformers_and_octavius():
    names = ("triton", "transformers", "octavius", "kernels")
    code = f"import sys, moe_lora; print(*[n for n in {names} if n in sys.modules])"
    assert run(code).split() == []


def test_model_is_loaded_without_data_training_report_and_trimesh():
    code = (
        "import sys, octavius.model.octavius\n"
        "names = [f'octavius.{name}' for name in ('data', 'training', 'evaluation', 'report')] + ['trimesh']\n"
        "print(*[n for n in names if n in sys.modules])"
    )
    assert run(code).split() == []


def test_namespace_called_kernels_does_not_break_transformers():
    """Hugging Face has a package of that name, which transformers imports if it finds one."""
    assert not (ROOT / "kernels/__init__.py").exists()
    code = (
        "import kernels; assert kernels.__file__ is None, kernels\n"
        "from transformers import CLIPVisionModel, LlamaForCausalLM, Trainer\n"
        "from transformers.integrations import hub_kernels\n"
        "import moe_lora; print(LlamaForCausalLM.__name__, len(moe_lora.backends()) > 0)"
    )
    assert run(code).split() == ["LlamaForCausalLM", "True"]
