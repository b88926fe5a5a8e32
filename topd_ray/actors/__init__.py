"""Workers around the engines, and the Ray actors made of them.

Each worker is a plain class: `actors/fleet.py` hands it to Ray, `pipeline/inline.py` calls it in one process.
"""
