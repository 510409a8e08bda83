"""Why the native kernels are missing, and the command that installs them."""

import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

_PACKAGE = Path(__file__).parents[1]


def missing(name: str, error: ImportError) -> str:
    """Reason and remedy for an extension that cannot be imported, in one sentence."""
    record = _PACKAGE / "_build.txt"
    reason = record.read_text().strip() if record.exists() else str(error)
    return f"{name} is not built ({reason}); {remedy(reason)}"


def left_out() -> bool:
    """Whether the installation was asked for no native kernels."""
    record = _PACKAGE / "_build.txt"
    return record.exists() and record.read_text().startswith("MOE_LORA_BUILD=none")


def remedy(reason: str = "") -> str:
    """What to type in a shell to have the native kernels built."""
    compiler = "install a C++ compiler (Debian, Ubuntu: apt install g++), then " if "compiler" in reason else ""
    return f"{compiler}run: {_command()}"


def _command() -> str:
    python = shlex.quote(sys.executable)
    root = _PACKAGE.parents[1]
    if (root / "setup.py").exists() and (root / "csrc").exists():  # sources, or an editable installation of them
        tools = f"{python} -m pip install pybind11 setuptools"
        return f"cd {shlex.quote(str(root))} && {tools} && {python} setup.py build_ext --inplace"
    try:
        distribution = importlib.metadata.distribution("octavius-moe-lora")
    except importlib.metadata.PackageNotFoundError:
        return f"{python} -m pip install . (where the sources are)"
    again = f"{python} -m pip install --no-cache-dir --force-reinstall --no-deps"
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    if origin.startswith("file:") and not origin.endswith(".whl"):
        return f"{again} {shlex.quote(unquote(urlparse(origin).path))}"
    return f"{again} --no-binary octavius-moe-lora octavius-moe-lora=={distribution.version}"
