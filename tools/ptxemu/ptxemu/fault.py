"""What the emulator raises."""


class Fault(RuntimeError):
    """A mistake of the kernel, found while it ran.

    Attributes:
        kind: one of `KINDS`.
    """

    KINDS = (
        "out of bounds",
        "misaligned",
        "uninitialised",
        "race",
        "asynchronous copy",
        "barrier",
        "shuffle",
        "blocks",
        "schedule",
        "deadlock",
        "trap",
        "operand",
    )

    def __init__(self, kind: str, message: str):
        assert kind in self.KINDS, kind
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Unknown(NotImplementedError):
    """PTX that the emulator does not know: the message names the instruction and its line."""
