"""SkyRL: a reward function for environments of skyrl-gym, and the mixin that makes an environment of it.

    register(id="reward_router", entry_point="service.trainers.skyrl_env:RouterEnv")
    environment.env_class=reward_router

SkyRL has no word for "no reward", so a missing one raises; it is never a 0. Options come from the environment's
`REWARD_ROUTER_CLIENT_…`, or from its configuration. Imports nothing of SkyRL; called by `skyrl_env` and by
environments of users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.trainers.conversation import as_sent
from service.trainers.samples import Sample, reference_text, scorer_from_environment


def reward(prompt: Any, turns: Sequence[Mapping[str, Any]], reference: str | None = None, **options: Any) -> Sample:
    """Return the sample of one episode, blocking: SkyRL runs environments in threads.

    Args:
        prompt: text or messages.
        turns: the assistant's turns, with what the environment said between them.
        reference: what a right answer looks like.
        options: of the client; they win over the environment's variables.

    Raises:
        RouterRefusedError: a final refusal.
    """
    response = as_sent(list(turns), "response", "assistant")
    return scorer_from_environment(**options).rows([as_sent(prompt)], [response], [reference])[0]


class RouterRewards:
    """Mixin for skyrl-gym's text environments: episodes end with the gateway's reward.

    Stands before `BaseTextEnv` among the bases. `observe` may be overridden for several turns.

    Args:
        env_config: options of the client by name, such as `url` and `run`; None for the environment's variables.
        extras: SkyRL's fields of the row; `max_turns` and `reward_spec.ground_truth` are read.
    """

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        given = dict(extras or {})
        self.max_turns = int(given.get("max_turns", 1))
        self.turns = 0
        self.options = dict(env_config or {})
        self.reference = reference_text((given.get("reward_spec") or {}).get("ground_truth"))
        self.prompt: Any = None
        self.said: list[Mapping[str, Any]] = []
        self.sample: Sample | None = None

    def init(self, prompt: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode with this prompt; SkyRL adds the episode's turns to the list that it gets back."""
        self.prompt = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else prompt
        self.said, self.turns, self.sample = [], 0, None
        return prompt, {}

    def observe(self, action: str) -> list[dict[str, str]]:
        """Return what the environment says to a turn; [] ends the episode."""
        return []

    def step(self, action: str) -> dict[str, Any]:
        """Take one turn of the assistant.

        Returns:
            What skyrl-gym calls a step: the last one carries the reward, the others 0, as they are no episode's end.

        Raises:
            RouterUnavailableError: there is no reward before the deadline.
            RouterRefusedError: a final refusal.
        """
        self.turns += 1
        self.said.append({"role": "assistant", "content": action})
        observations = self.observe(action) if self.turns < self.max_turns else []
        if observations:
            self.said.extend(observations)
            return {"observations": observations, "reward": 0.0, "done": False, "metadata": {}}
        self.sample = reward(self.prompt, self.said, self.reference, **self.options)
        metadata = {"model": self.sample.model, "decision_id": self.sample.decision_id}
        return {"observations": [], "reward": self.sample.require(), "done": True, "metadata": metadata}

    def get_metrics(self) -> dict[str, float]:
        """Return the components of the episode's reward; SkyRL averages them."""
        return {} if self.sample is None else self.sample.metrics()
