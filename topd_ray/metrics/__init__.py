"""Figures of a run: how they are reduced, and where they are written."""
