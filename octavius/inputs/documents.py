"""JSON and YAML files of users: whatever is wrong with one is a ValueError of one line that names it."""

import json
from pathlib import Path
from typing import Any

import yaml

DEEP = "lists and objects are nested too deeply"


def read_json(path: str | Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {DEEP}") from error
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, as `parse_yaml`.

    Raises:
        ValueError: it cannot be read, is no YAML, or is nested too deeply.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The content of a YAML text; errors begin with `where`.

    Raises:
        ValueError: it is no YAML, or is nested too deeply.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{where}: not valid YAML: {DEEP}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise ValueError(f"{where}: not valid YAML: {error}") from error
