"""A run's event log outside the store: files for audit and off-policy evaluation (docs/off-policy.md).

`record` says what one event is, `parquet` and `jsonl` how a file holds it, `export` fills a file from a store, `load`
reads a file back as arrays. Called by the commands `export` and `ope`.
"""
