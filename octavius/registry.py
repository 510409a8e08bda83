"""Parts by name: those of this package, those that a program registers, and those of installed packages.

An installed package offers parts through a Python entry point. Its `pyproject.toml` says, for example,

    [project.entry-points."octavius.benchmarks"]
    my-benchmark = "my_package:BENCHMARK"
"""

import difflib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Parts of one kind by name.

    Args:
        kind: what a part is called in errors, such as "benchmark".
        group: the group of entry points; each gives one part under the entry point's name.
        check: raises TypeError or ValueError if a part is not usable; receives its name and the part.
    """

    def __init__(self, kind: str, group: str, check: Callable[[str, Part], None]):
        self.kind, self.group, self.check = kind, group, check
        self.parts: dict[str, Part] = {}

    def register(self, name: str, part: Part) -> None:
        """Add a part.

        Raises:
            TypeError, ValueError: the part is not usable, or its name is taken by another.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"the name of a {self.kind} must be a text, got {name!r}")
        self.check(name, part)
        if self.parts.get(name, part) != part:
            raise ValueError(f"a {self.kind} called {name!r} is registered already; choose another name")
        self.parts[name] = part

    def __getitem__(self, name: str) -> Part:
        """The part of this name.

        Raises:
            ValueError: there is none, or the package that offers it cannot be loaded.
        """
        if name not in self.parts:
            offered = self._offered()
            if name not in offered:
                known = sorted({*self.parts, *offered})
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{self.kind} must be one of {', '.join(known)}, got {name!r}{hint}")
            self._load(offered[name])
        return self.parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self.parts or name in self._offered()

    def __iter__(self) -> Iterator[str]:
        """Names, this package's first; a part of another package is not loaded for it."""
        yield from dict.fromkeys((*self.parts, *sorted(self._offered())))

    def _offered(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def _load(self, entry: EntryPoint) -> None:
        try:
            part = entry.load()
            self.register(entry.name, part)
        except Exception as error:  # the code of another package, which may raise anything
            raise ValueError(
                f"the {self.kind} {entry.name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
            ) from error
