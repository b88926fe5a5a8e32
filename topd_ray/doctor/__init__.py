"""`topd doctor`: `machine` tells what this machine has and lacks, `run` whether a run folder is well."""
