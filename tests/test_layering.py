"""The import graph: every module has its layer, imports point down, and nothing is called `kernels`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = {"moe_lora": ROOT / "kernels", "octavius": ROOT}
LAYERS = (  # lowest first; modules of one layer do not import each other
    ("moe_lora.dropout", "moe_lora.routing", "moe_lora.triton_dropout"),
    ("moe_lora.triton_kernels",),
    ("moe_lora.triton_launch",),
    (
        "moe_lora.gate",
        "moe_lora.reference",
        "moe_lora.cpu",
        "moe_lora.cuda",
        "moe_lora.triton_backend",
        "moe_lora.measure",
    ),
    ("moe_lora.dispatch",),
    ("moe_lora.ops",),
    ("moe_lora.group",),
    ("moe_lora.layers", "moe_lora.check"),
    ("moe_lora.inject",),
    ("moe_lora.checkpoint",),
    ("moe_lora",),
    ("moe_lora.__main__", "octavius"),
    ("octavius.convert", "octavius.metrics", "octavius.questions", "octavius.scenes", "octavius.faces"),
    ("octavius.points", "octavius.facts", "octavius.attention"),
    ("octavius.assets", "octavius.stamps", "octavius.config", "octavius.prompts", "octavius.render"),
    ("octavius.furniture", "octavius.candidates", "octavius.pointbert", "octavius.scan2inst", "octavius.report"),
    (
        "octavius.minilamm",
        "octavius.rooms",
        "octavius.objects",
        "octavius.aggregation",
        "octavius.encoders",
        "octavius.llm",
        "octavius.projector",
    ),
    ("octavius.data", "octavius.upstream3d", "octavius.pretrain_points"),
    ("octavius.model", "octavius.align", "octavius.scannet", "octavius.enrich"),
    ("octavius.scene_picture",),
    ("octavius.train", "octavius.evaluate", "octavius.chat"),
    ("octavius.demo",),
    ("octavius.cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    for package, root in ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


FILES = dict(modules())


def imports(path, everywhere=True):
    """Names of what a file imports: modules where the name is one of ours, else as written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in full)


def test_every_module_has_one_layer():
    listed = [name for names in LAYERS for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(FILES), "list new modules in LAYERS, and take out those that are gone"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    for target in imports(FILES[name]):
        if target in LEVEL:
            assert LEVEL[target] < LEVEL[name], f"{name} (layer {LEVEL[name]}) imports {target} ({LEVEL[target]})"
        assert target.partition(".")[0] not in ("kernels", "tests", "benchmarks"), f"{name} imports {target}"


def test_engine_needs_torch_and_safetensors_alone():
    foreign = {
        (name, target)
        for name, path in FILES.items()
        if name.startswith("moe_lora")
        for target in imports(path)
        if target.partition(".")[0] not in {"moe_lora", "torch", "safetensors", *sys.stdlib_module_names}
    }
    assert {name for name, _ in foreign} <= {
        f"moe_lora.triton_{part}" for part in ("dropout", "kernels", "launch", "backend")
    }
    assert {target.partition(".")[0] for _, target in foreign} == {"triton"}


def test_triton_is_imported_only_when_needed():
    assert run("import sys, moe_lora; print('triton' in sys.modules)").split() == ["False"]


def test_engine_is_loaded_without_transformers_and_octavius():
    code = "import sys, moe_lora; print(*[n for n in ('transformers', 'octavius', 'kernels') if n in sys.modules])"
    assert run(code).split() == []


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("octavius")))
def test_octavius_uses_the_public_names_of_the_engine(name):
    assert not [target for target in imports(FILES[name]) if target.startswith("moe_lora.")]


def test_no_package_is_called_kernels():
    assert not (ROOT / "kernels/__init__.py").exists()


def run(code):
    """A fresh interpreter at the root of the tree, where `kernels` is a namespace that can be imported."""
    path = os.pathsep.join(map(str, dict.fromkeys(ROOTS.values())))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_namespace_called_kernels_does_not_break_transformers():
    """Hugging Face has a package of that name, which transformers imports if it finds one."""
    code = (
        "import kernels; assert kernels.__file__ is None, kernels\n"
        "from transformers import CLIPVisionModel, LlamaForCausalLM, Trainer\n"
        "from transformers.integrations import hub_kernels\n"
        "import moe_lora; print(LlamaForCausalLM.__name__, len(moe_lora.backends()) > 0)"
    )
    assert run(code).split() == ["LlamaForCausalLM", "True"]
