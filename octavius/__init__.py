"""Octavius: one LLM decoder, several modalities, low-rank experts chosen once per instance (ICLR 2024, arXiv 2311.02684)."""
