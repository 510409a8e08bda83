"""How a run ends early, as exceptions; the command reads them without loading torch."""

EXIT_PREEMPTED = 85  # the command's exit code after SIGTERM: what is to be saved is saved, start it again with --resume


class TrainingStoppedError(RuntimeError):
    """A run that must not go on; its last good checkpoint stays."""


class PreemptedError(TrainingStoppedError):
    """SIGTERM came; the run is saved and goes on with --resume."""
