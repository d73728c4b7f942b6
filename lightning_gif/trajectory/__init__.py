"""Influence through training: the record of a run, its replay, and the adjoint of its optimizer steps."""
