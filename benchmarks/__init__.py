"""Measurements of the whole service; see scripts/bench."""
