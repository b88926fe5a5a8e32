"""Trajectory-aware on-policy distillation (TOPD, arXiv 2606.00305) as a distributed pipeline on Ray."""

__version__ = "0.1.0"
