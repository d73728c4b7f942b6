"""Tests of influence through training."""
