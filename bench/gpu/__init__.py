"""Measurements that need a GPU, torch, NumPy and SciPy, and Triton for a part of them."""
