"""skyrl-gym's environment for single turns, with the gateway's rewards.

Imports skyrl-gym, so it can be loaded only where skyrl-gym is; called by it, which finds it by name. For several turns,
override `observe`.
"""

from skyrl_gym.envs.base_text_env import BaseTextEnv  # type: ignore[import-not-found, unused-ignore]

from service.trainers.skyrl import RouterRewards


class RouterEnv(RouterRewards, BaseTextEnv):  # type: ignore[misc, unused-ignore]
    """`BaseTextEnv` whose reward comes from the gateway."""
