"""The small servers of ours: reward models on the CPU, recorded scores, an encoder. They answer as vLLM does."""
