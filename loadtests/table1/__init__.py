"""Table 1 of the paper at the scale of a laptop: online DPO for every row, rewards from the running service.

`python -m loadtests.table1` is the command (`make table1`). `tasks` and its families need numpy only; `policy`, `sft`,
`rewards` and `dpo` need torch. Nothing is imported here.
"""
