"""Judges: generative models behind OpenAI-compatible servers that compare or grade responses by a rubric."""
