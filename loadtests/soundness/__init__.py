"""Do the statistics keep what they promise? One module per experiment; `python -m loadtests.soundness` runs them.

    python -m loadtests.soundness [NAME …] [--seeds N] [--data FILE] [--workers N] [--json OUT]

Each experiment simulates what is promised in `docs/math/` or `docs/off-policy.md`, with the truth known, and prints
how often the promise was kept.
"""
