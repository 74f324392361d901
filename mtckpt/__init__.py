"""Checkpoints of a training run, kept in several tiers at once."""
