"""`topd probe`: near futures of high-loss, random and low-loss positions (figures 2, 4 and 6 of the paper)."""
