"""The script `octavius`, and `python -m octavius`: checks that the packages of the command are there, and runs it."""

import importlib.metadata
import json
import shlex
import sys
from urllib.parse import unquote, urlparse

NAME = "octavius-moe-lora"


def main() -> None:
    """Run the command; without its extra say in one line which one to install."""
    try:
        from octavius.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("octavius", "moe_lora"):
            raise
        print(f"error: {error.name} is not installed; run: {command('octavius')}", file=sys.stderr)
        raise SystemExit(1) from error


def command(extra: str) -> str:
    """What to type in a shell to install an extra, from where this installation came."""
    install = f"{shlex.quote(sys.executable)} -m pip install"
    try:
        origin = json.loads(importlib.metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return f"{install} '.[{extra}]' (where the sources are)"
    url = origin.get("url", "")
    if not url.startswith("file:"):
        return f"{install} '{NAME}[{extra}]'"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"{install} {editable}{shlex.quote(f'{unquote(urlparse(url).path)}[{extra}]')}"


if __name__ == "__main__":
    main()
