"""What `up` and `models` say of a gateway that runs: who can be asked, and a request that it has just answered.

Called by `service.cli.up` and `service.cli.models`; knows the gateway by its HTTP API only.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from router_core.dataset import load_rows
from service.cli.key_option import KEY_VARIABLE
from service.lab.client import GatewayClient, GatewayError
from service.pool import PoolFile

EXAMPLE: Final = {"prompt": "What is 7 + 5?", "responses": ["7 + 5 = 12", "7 + 5 = 13"]}

SHOWN_INLINE: Final = 240
"""Characters of a request that is printed in full; a longer one is written to a file."""


def askable_lines(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return "2 of 3 scorers can be asked", and a line with the reason for each that cannot.

    Args:
        models: the answer of `GET /models`.
    """
    away = [model for model in models if not model["available"]]
    count = f"{len(models) - len(away)} of {len(models)} scorers can be asked"
    return [count, *(f"{model['name']}: {_reason(model)}" for model in away)]


def example_of(pool: PoolFile) -> dict[str, Any]:
    """Return a request that the pool's scorers know: recorded ones know recorded texts only."""
    recorded = [model for model in pool.reward_models if model.recorded is not None]
    if not recorded:
        return EXAMPLE
    names = {model.served for model in recorded}
    known = [row for row in load_rows(recorded[0].recorded or "") if names <= row.scores.keys()]
    shortest = min(known, key=lambda row: len(str(row.fields)), default=None)
    if shortest is None:
        return EXAMPLE
    fields = shortest.fields
    responses = fields.get("responses") or [fields["response_a"], fields["response_b"]]
    return {"prompt": fields["prompt"], "responses": responses}


async def ready_lines(url: str, pool: PoolFile, data_dir: Path, api_key: str | None) -> list[str]:
    """Ask a ready gateway for its run and who can be asked, make one request, and return what to print.

    Args:
        url: of the gateway.
        pool: of it, with where its scorers are.
        data_dir: where a long request is written to.
        api_key: of the gateway; None where it has none.

    Returns:
        Lines. A request is printed only after it was answered with rewards; where the key is missing or not enough,
        they say so.
    """
    try:
        return await _asked(url, pool, data_dir, api_key)
    except GatewayError as error:
        if error.answered not in (401, 403):
            raise
        return [
            f"keys are needed, and {'the one given is not enough' if api_key else 'none is given'}: set {KEY_VARIABLE} "
            "to one with the scopes read and reward (`reward-router keys new --scope read --scope reward`), and a "
            "first request is made and shown here"
        ]


async def _asked(url: str, pool: PoolFile, data_dir: Path, api_key: str | None) -> list[str]:
    async with GatewayClient(url, api_key=api_key) as client:
        posterior = await client.get("/posterior")
        lines = [
            f"run {posterior['run']}: {posterior['version']} events learned, signal {posterior['signal']}",
            *askable_lines(await client.get("/models")),
        ]
        body = example_of(pool)
        try:
            reply = await client.post("/reward", body)
        except GatewayError as error:
            return [*lines, "", f"a first request got no reward: {error}"]
    rewards = ", ".join(f"{reward:.4g}" for reward in reply["rewards"])
    return [
        *lines,
        "",
        "a first request, just made (the same again):",
        "",
        *_curl(url, body, data_dir, keyed=api_key is not None),
        "",
        f"its answer: model {reply['model'] or 'several'}, rewards [{rewards}], preferred {reply['preferred']}, "
        f"decision_id {reply['decision_id']}",
    ]


def _curl(url: str, body: Mapping[str, Any], data_dir: Path, *, keyed: bool) -> list[str]:
    """The request as a command for a shell."""
    text = json.dumps(body, ensure_ascii=False)
    if len(text) > SHOWN_INLINE:
        file = data_dir / "request.json"
        file.write_text(text, "utf-8")
        data = shlex.quote(f"@{file}")
    else:
        data = shlex.quote(text)
    key = [f'    -H "authorization: Bearer ${KEY_VARIABLE}" \\'] if keyed else []
    head = f"  curl -s {url}/reward -H 'content-type: application/json' \\"
    lines = [head, *key, f"    -d {data}"]
    if keyed:
        lines.insert(0, f"  export {KEY_VARIABLE}=...    # a key with the scope reward")
    return lines


def _reason(model: Mapping[str, Any]) -> str:
    """Why a scorer cannot be asked: what its replicas' probes found."""
    found = [f"{one['url']} {one['problem'] or 'does not answer'}" for one in model["replicas"]]
    return "; ".join(dict.fromkeys(found)) or "it has no server"
