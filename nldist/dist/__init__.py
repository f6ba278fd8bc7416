"""Ranks, engines, per-sample tables and checkpoints."""
