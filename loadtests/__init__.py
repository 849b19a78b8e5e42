"""Benchmarks: each module prints a table with what it measured beside what it is compared with, and writes JSON.

Nothing here decides a test; figures with the commands that made them stand in `loadtests/README.md`.
"""
