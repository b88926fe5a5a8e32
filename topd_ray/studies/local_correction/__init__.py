"""`topd study local-correction`: what a few updates leave of one divergent point (figure 5 of the paper)."""
