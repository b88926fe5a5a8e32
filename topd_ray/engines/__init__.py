"""Rollout, teacher and learner engines as plain classes."""
