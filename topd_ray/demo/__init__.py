"""The embedded pairs, each a small teacher and student, and the arithmetic tasks that they were trained on."""
