"""Labelling: every RM of a pool asked about many rows, resumable. Called by the command `label`."""
