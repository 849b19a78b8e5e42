"""ROLL's rollout of a prompt that gives the prompt up where one of its responses has no reward.

    user_defined_rollout_loop_cls: service.trainers.roll_rollout.RouterRolloutLoop

ROLL takes None for "not this prompt, take another one", and has no word for one response. Without this class a missing
reward ends the training. Imports ROLL, so it can be loaded only where ROLL is; called by it, which finds it by path.
"""

import logging
from typing import Any

from roll.distributed.scheduler.user_defined_rollout_loop import (  # type: ignore[import-not-found, unused-ignore]
    UserDefinedRolloutLoop,
)

from service.trainers.values import RouterUnavailableError

logger = logging.getLogger("reward_router")


class RouterRolloutLoop(UserDefinedRolloutLoop):  # type: ignore[misc, unused-ignore]
    """`UserDefinedRolloutLoop`, whose own steps stay as they are."""

    async def _generate_and_reward(self, context: Any, req: Any, domain: str) -> Any:
        """Return ROLL's responses of one request; None, by which ROLL gives the prompt up, if one has no reward.

        Raises:
            RouterUnavailableError: likewise while ROLL validates, where it must have every prompt.
        """
        try:
            return await super()._generate_and_reward(context=context, req=req, domain=domain)
        except RouterUnavailableError as error:
            if context.is_val:
                raise
            logger.warning("a prompt is given up, for a response has no reward (%s): %s", error.code, error.message)
            return None
