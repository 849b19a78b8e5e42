"""`make tables`: every figure of the learning, printed, plotted, and written to docs/results.md.

    python -m loadtests.tables [DATA] [--write docs] [--json OUT]

| module | what |
|---|---|
| `experiments` | what is measured: pools, splits, streams, policies, ablations; values only |
| `encodings` | the pairs' features, from the cache; what would take too long is said, not computed |
| `work` | fits and replays as tasks of worker processes, each fit once |
| `offline` | Table 2: figures of offline routing |
| `online` | figures of streams: by policy, by domain, by ablation |
| `page`, `sections`, `prose`, `sheets` | the figures as a page for people |
| `pictures` | the figures as PNG |

Knows recorded pairs only: no gateway, no network.
"""
