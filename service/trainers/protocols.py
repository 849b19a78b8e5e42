"""Trainers that speak by URL: one record each, which drives handler, feedback route, OpenAPI page and `check-trainer`.

A new one is a module beside this with its request, its reply, `read`, `write` and a `PROTOCOL`, and a line in
`PROTOCOLS`. Called by `service.handlers.trainers` and `service.handlers.openapi_trainers`.
"""

from __future__ import annotations

from service.trainers import llamafactory, openrlhf, slime
from service.trainers.shim import UrlProtocol

PROTOCOLS: tuple[UrlProtocol, ...] = (openrlhf.PROTOCOL, llamafactory.PROTOCOL, slime.PROTOCOL)
"""All of them, in the order of the API's page."""
