"""Audits: which decisions a referee looks at, what its verdicts teach, and what they say of who is right.

`schedule` chooses, `referee` weighs, `record` reports. Modules are imported by name, since the posterior needs
`referee` alone.
"""
