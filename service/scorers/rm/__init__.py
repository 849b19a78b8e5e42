"""Reward models: a scalar per (prompt, response), from servers that speak vLLM's `/classify`."""
