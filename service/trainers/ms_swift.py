"""A reward function for ms-swift's GRPO, asynchronous, and its registration.

    swift rlhf --rlhf_type grpo --external_plugins "$(python -m service.trainers.ms_swift)" --reward_funcs reward_router

Options come from the environment (`REWARD_ROUTER_CLIENT_URL`, `REWARD_ROUTER_CLIENT_RUN`, …), because ms-swift hands a
plugin nothing of its own. Knows ms-swift 4's call, `await f(completions, messages=…, **columns) -> list[float | None]`;
imports nothing of it until `register` is called. ms-swift adds up what its functions say of a row and passes over None,
so that a row of which none says anything counts as a 0 beside the others of its group. So where one row of a group has
no reward, the whole group is given None: all its rows weigh the same and teach nothing. Rollouts of several turns are
one group by ms-swift's `prompt_id`: what they share is the prompt, and the turns after it are the responses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from service.trainers.client import AsyncRouterClient
from service.trainers.conversation import split_messages
from service.trainers.options import ClientOptions, from_environment
from service.trainers.rowwise import Judge, OnMissing, RowOptions
from service.trainers.trl import AsyncRouterReward

NAME = "reward_router"
"""Under which ms-swift finds the function."""

REFERENCE = "solution"
"""Column in which ms-swift's data sets keep the right answer; sent as the reference where there is one."""

PLUGIN = Path(__file__).with_name("plugins") / "reward_router_swift.py"
"""The file for `--external_plugins`."""


class RouterORM:
    """One instance per prompt, all its completions scored by one reward model.

    Stands where ms-swift's `AsyncORM` does, without deriving from it: this module imports without ms-swift.

    Args:
        args: ms-swift's arguments; not used.
        options: of the client; by default the environment's.
        judge: says what is known about a scored group, where anything is: it is posted to `/feedback`.
        others: ignored.
    """

    def __init__(
        self, args: Any = None, *, options: ClientOptions | None = None, judge: Judge | None = None, **others: Any
    ) -> None:
        self.args = args
        self.options = options if options is not None else from_environment(os.environ)
        self.judge = judge

    async def __call__(
        self, completions: Sequence[str], messages: Sequence[Sequence[Any]] | None = None, **columns: Any
    ) -> list[float | None]:
        """Rewards per row.

        Args:
            completions: (n,) texts.
            messages: (n,) conversations, the completion last.
            columns: what else ms-swift hands over.

        Returns:
            (n,) rewards; None for every row of a group in which one could not be had.

        Raises:
            ValueError: there are no messages.
            RouterRefusedError: a wrong key, run or policy.
        """
        if messages is None:
            raise ValueError("ms-swift gave no messages: this function needs the prompt, which they hold")
        prompts: list[Any] = [split_messages(conversation)[0] for conversation in messages]
        responses: list[Any] = list(completions)
        for rows in _rows_of(columns.get("prompt_id"), len(prompts)):
            shared = _shared_turns([messages[row] for row in rows])
            if shared and any(prompts[row] != prompts[rows[0]] for row in rows):
                for row in rows:
                    prompts[row], responses[row] = list(messages[row][:shared]), list(messages[row][shared:])
        # ms-swift runs every step in an event loop of its own, which connections would not outlive.
        async with AsyncRouterClient(self.options) as client:
            options = RowOptions(on_missing=OnMissing.GROUP, reference=REFERENCE if REFERENCE in columns else None)
            reward = AsyncRouterReward(client=client, judge=self.judge, row_options=options)
            return await reward(prompts, responses, **columns)


def _rows_of(prompt_ids: Sequence[Any] | None, count: int) -> list[list[int]]:
    """Return the rows of each of ms-swift's prompts; none where it does not say which they are."""
    if prompt_ids is None or len(prompt_ids) != count:
        return []
    found: dict[Any, list[int]] = {}
    for row, prompt_id in enumerate(prompt_ids):
        found.setdefault(prompt_id, []).append(row)
    return list(found.values())


def _shared_turns(conversations: Sequence[Sequence[Any]]) -> int:
    """Return the number of leading turns that all conversations share and that an assistant's turn follows; 0 if none.

    Rollouts of several turns differ from their first answer on; what they share is the prompt.
    """
    places = [
        turn
        for turn in range(1, min(map(len, conversations)))
        if all(one[:turn] == conversations[0][:turn] and one[turn].get("role") == "assistant" for one in conversations)
    ]
    return max(places, default=0)


def register(name: str = NAME, orm: type = RouterORM) -> None:
    """Add the function to ms-swift's table.

    Args:
        name: what `--reward_funcs` says.
        orm: the class; one of your own with a judge, for example.

    Raises:
        ModuleNotFoundError: ms-swift 4 is not installed.
    """
    table: MutableMapping[str, type] = import_module("swift.rewards").orms
    table[name] = orm


if __name__ == "__main__":
    sys.stdout.write(f"{PLUGIN}\n")
