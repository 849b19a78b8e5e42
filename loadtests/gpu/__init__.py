"""The whole stack on one GPU machine, beside what it is compared with, in one run: `python -m loadtests.gpu`.

Makes reward models and an encoder of real shapes with random weights, so that nothing is downloaded; `--toy` makes tiny
ones, for any laptop. Speed does not depend on what weights mean.
"""
