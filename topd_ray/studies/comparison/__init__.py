"""`topd study ablation` and `topd study sweep`: whole runs against each other (tables 1 and 2 of the paper)."""
