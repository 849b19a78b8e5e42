"""Encoders whose transformer is served elsewhere: how texts are read here, and the client of a vLLM pooling server.

`service.wiring` builds them; use cases see `service.encoders.protocol`. Needs no torch.
"""
