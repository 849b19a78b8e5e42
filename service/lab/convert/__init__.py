"""Preference data as people publish it, made into the rows of docs/data.md.

`reading` knows files, `texts` conversations, `formats` which columns mean what; `convert` puts them together and
counts. No RM is asked. Called by the command `convert`.
"""
