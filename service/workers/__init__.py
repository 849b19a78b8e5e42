"""Reward-model workers: the client of vLLM's HTTP API, and the small workers that answer in the same words."""
