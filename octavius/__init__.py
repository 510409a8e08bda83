"""Octavius: one LLM decoder, several modalities, low-rank experts chosen once per instance (arXiv 2311.02684)."""
