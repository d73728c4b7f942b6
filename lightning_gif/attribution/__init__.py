"""Influence scores: how they are computed, stored, ranked and shown."""
