"""What is said to an RM's workers: `/classify` with items of one rendering, and what their answers and refusals mean.

`service.scorers.rm.client` makes one per rendering; `service.scorers.requests` uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.scorers.protocol import OverLong, WorkerRejectedError, WorkerTooLongError
from service.scorers.rm.answers import RewardBound, Rewards, read_rewards
from service.scorers.rm.render import RenderError, Rendering, encode
from service.scorers.transport.exchange import AnswerError
from service.scorers.wire import CLASSIFY_PATH, PROBE_PROMPT, PROBE_RESPONSE, says_too_long

if TYPE_CHECKING:
    from service.scorers.rm.client import ArmConfig


class ClassifyDialogue:
    """Implements `service.scorers.requests.Dialogue` for one RM.

    Args:
        config: of the RM.
        rendering: of the items.
        bound: of the RM's rewards, shared by its dialogues.
    """

    path = CLASSIFY_PATH

    def __init__(self, config: ArmConfig, rendering: Rendering, bound: RewardBound) -> None:
        self._config = config
        self._rendering = rendering
        self._bound = bound

    def read(self, body: bytes, count: int) -> Rewards:
        """Return the rewards in an answer, within the RM's bound and transformed as configured."""
        told = read_rewards(body, count, self._config.heads)
        try:
            self._bound.check(told.rewards)
        finally:
            # The good ones of an answer that is refused, too: they say that the outlier, asked alone, is one.
            self._bound.learn(told.rewards)
        scale, shift = self._config.reward_scale, self._config.reward_shift
        if scale == 1.0 and shift == 0.0:
            return told
        return Rewards([scale * reward + shift for reward in told.rewards], told.heads)

    def probe(self) -> bytes | None:
        """Return a request about the probe conversation; None where it cannot be rendered."""
        try:
            return encode(self._rendering, self._config.served_model, [(PROBE_PROMPT, PROBE_RESPONSE)])
        except RenderError:
            return None

    def answers_probe(self, body: bytes) -> bool:
        """Return True if the body holds one usable reward."""
        try:
            self._bound.check(read_rewards(body, 1, self._config.heads).rewards)
        except AnswerError:
            return False
        return True

    def refusal(self, message: str, details: dict[str, object], status: int, body: bytes) -> WorkerRejectedError:
        """Return the error of a refusal, which may blame the length of the input."""
        if says_too_long(status, body):
            return WorkerTooLongError(message, details=details, final=self._config.over_long is OverLong.REFUSE)
        return WorkerRejectedError(message, details=details)
