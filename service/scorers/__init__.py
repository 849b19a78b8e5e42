"""Scorers: who can be asked for a reward. A Protocol, a room per kind, and one transport for all."""
