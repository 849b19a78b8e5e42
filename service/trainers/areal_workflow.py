"""AReaL's workflow for single turns, with the gateway's rewards.

    trainer.train(workflow="service.trainers.areal_workflow.RouterWorkflow", ...)

Imports AReaL, so it can be loaded only where AReaL is; called by AReaL, which finds it by name. For another workflow,
put `RouterRewards` before it in the same way.
"""

from areal.workflow.rlvr import RLVRWorkflow  # type: ignore[import-not-found, unused-ignore]

from service.trainers.areal import RouterRewards


class RouterWorkflow(RouterRewards, RLVRWorkflow):  # type: ignore[misc, unused-ignore]
    """`RLVRWorkflow`; takes the same arguments, `reward_options` instead of `reward_fn`."""
