"""Encoders whose transformer is served elsewhere: how texts are read here, and the client of a vLLM pooling server.

`service.gateway` builds them; use cases see `service.encoders.protocol`. Needs no torch.
"""
