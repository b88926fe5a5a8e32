"""The embedded pair: a small teacher and student, and the arithmetic task that both were trained on."""
