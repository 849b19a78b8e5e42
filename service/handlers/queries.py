"""Parameters of queries that several routes take."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from service.schemas import RUN_SHAPE

RunQuery = Annotated[str | None, Query(pattern=RUN_SHAPE, description="The run; by default the gateway's.")]
