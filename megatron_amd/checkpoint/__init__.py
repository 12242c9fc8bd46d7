"""Weights on disk: Hugging Face folders, and a run's own checkpoints."""
