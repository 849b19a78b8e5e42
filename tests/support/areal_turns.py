"""AReaL's workflow of several turns with the gateway's rewards, as a user makes it; loadable where AReaL is."""

from areal.workflow.multi_turn import MultiTurnWorkflow  # type: ignore[import-not-found, unused-ignore]

from service.trainers.areal import RouterRewards


class RouterTurns(RouterRewards, MultiTurnWorkflow):  # type: ignore[misc, unused-ignore]
    """`MultiTurnWorkflow`; asks once more where the reward is 0."""
