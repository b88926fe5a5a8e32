"""The paper's experiments as commands: what near-future guidance is worth on a pair of your own (docs/studies.md).

| module | what it holds |
| --- | --- |
| `probe` | `topd probe`; begin in its `study`, as in the two below |
| `local_correction` | `topd study local-correction` |
| `comparison` | `topd study ablation` and `sweep`: arms, their runs, what they learnt, and which is better |
| `report` | `topd study report`: docs/results.md, from the results of all |
| `results`, `tables`, `pictures` | the folder of a study: results.json, tables to read, the look of pictures |
| `statistics` | bootstrap intervals, correlations, areas under ROC curves |
| `rollouts`, `futures`, `parts` | student rollouts, the teacher beside them, Parquet parts |
| `labelling` | what a mismatch means, where that is known by construction |
"""
