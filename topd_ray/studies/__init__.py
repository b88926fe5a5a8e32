"""The paper's experiments as commands: what near-future guidance is worth on a pair of your own.

| module | what it holds |
| --- | --- |
| `results` | a study's folder: results.json, and whose it is |
| `statistics` | bootstrap intervals, correlations, areas under ROC curves |
| `pictures` | the common look of the pictures |
"""
