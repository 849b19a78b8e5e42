"""`reward-router audit`: people judge audited decisions, one after the other, in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import urlencode

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from service.cli.key_option import key_option
from service.cli.url_option import Url
from service.lab.client import GatewayClient

CHOICES = "1, 2, … the better response · t tie · s skip · q quit"
"""What may be answered."""


def audit(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    url: Url,
    api_key: Annotated[str | None, key_option()] = None,
    count: Annotated[int, typer.Option(min=1, max=200, help="Audits to look at, at most.")] = 20,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the order of responses; by default another each time.")
    ] = None,
) -> None:
    """Judge audited decisions: which response is better? What you say is gold.

    Responses stand in random order, and nothing is shown of what referee and reward models said.
    """
    asyncio.run(_audit(run, url, api_key, count, np.random.default_rng(seed), Console(), _ask))


def _ask(_: int) -> str:
    answer: str = typer.prompt(CHOICES, prompt_suffix=" > ", default="s", show_default=False)
    return answer


async def _audit(
    run: str,
    url: str,
    api_key: str | None,
    count: int,
    rng: np.random.Generator,
    console: Console,
    ask: Callable[[int], str],
) -> None:
    sent = skipped = 0
    async with GatewayClient(url, api_key=api_key) as gateway:
        audits = await gateway.get("/audits?" + urlencode({"run": run, "count": count}))
        waiting = [one for one in audits if not one["judged"]]
        if not waiting:
            console.print(
                f"no audits of run {run} wait for a judgement ({len(audits)} are judged): see `audit` in the pool file",
                highlight=False,
                soft_wrap=True,
            )
            return
        for number, one in enumerate(waiting, start=1):
            order = rng.permutation(len(one["responses"])).tolist()
            _show(one, order, f"{number} of {len(waiting)}", console)
            choice = _read(ask, len(order), console)
            if choice == "q":
                break
            if choice == "s":
                skipped += 1
                continue
            preferred = None if choice == "t" else order[int(choice) - 1]
            judgement = {"run": run, "decision_id": one["decision_id"], "preferred": preferred}
            await gateway.post("/audits/judge", judgement)
            sent += 1
    console.print(f"{sent} judgements of run {run} sent, {skipped} skipped", highlight=False)


def _show(one: dict[str, Any], order: list[int], title: str, console: Console) -> None:
    console.print(Panel(escape(one["prompt"]), title=f"prompt, {title}", title_align="left"))
    if one["reference"] is not None:
        console.print(Panel(escape(one["reference"]), title="reference", title_align="left"))
    for place, index in enumerate(order, start=1):
        console.print(Panel(escape(one["responses"][index]), title=f"response {place}", title_align="left"))


def _read(ask: Callable[[int], str], n: int, console: Console) -> str:
    """Return what was answered: a place from 1 to n, `t`, `s` or `q`."""
    while True:
        answer = ask(n).strip().lower()
        if answer[:1] in ("t", "s", "q"):
            return answer[0]
        if answer.isdigit() and 1 <= int(answer) <= n:
            return answer
        console.print(f"{answer!r}: answer with {CHOICES}", highlight=False)
