"""The paper's experiments as commands: what near-future guidance is worth on a pair of your own.

| module | what it holds |
| --- | --- |
| `results` | a study's folder: results.json, and whose it is |
| `arms` | what the ablation and the sweep compare |
| `runs` | their runs: processes, as many at a time as asked for, that go on where they stopped |
| `learning` | what a finished run learnt, read from its folder |
| `comparison`, `comparison_report` | arms against each other: figures, table and pictures |
| `statistics` | bootstrap intervals, correlations, areas under ROC curves |
| `rollouts`, `futures` | student rollouts, the teacher beside them, exact distances |
| `local_correction` | `topd study local-correction`; parts: `divergent_points`, `correction`, `correction_figures` |
| `pictures` | the common look of the pictures |
| `rollouts`, `parts` | student rollouts, kept in Parquet parts that are whole or not there |
| `labelling` | what a mismatch means, where that is known by construction |
| `probe` | `topd probe`; its rows, figures, examples and pictures in `probe_*` |
"""
