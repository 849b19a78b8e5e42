"""Recorded pairs as a stream: what is learned before it, and the stream through a running gateway."""
