"""Runs compiled GPU kernels on the CPU: an emulator of PTX with bounds checks, race detection and a profiler's counters."""
