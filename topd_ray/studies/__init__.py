"""The paper's experiments as commands: what near-future guidance is worth on a pair of your own.

| module | what it holds |
| --- | --- |
| `results` | a study's folder: results.json, and whose it is |
| `arms` | what the ablation and the sweep compare |
| `runs` | their runs: processes, as many at a time as asked for, that go on where they stopped |
| `learning` | what a finished run learnt, read from its folder |
| `comparison`, `comparison_report` | arms against each other: figures, table and pictures |
| `statistics` | bootstrap intervals, correlations, areas under ROC curves |
| `pictures` | the common look of the pictures |
"""
