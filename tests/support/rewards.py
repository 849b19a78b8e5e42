"""Results as the client gives them, for tests of what trainers make of them."""

from __future__ import annotations

from collections.abc import Sequence

from service.trainers.values import Scored


def scored(*rewards: float | None, failure: Sequence[str | None] | None = None) -> Scored:
    """Return the rewards of one instance by `rm-a`.

    Args:
        rewards: per response; None where there is none.
        failure: stable codes, as the gateway names them.
    """
    extra = {} if failure is None else {"failure": failure}
    return Scored("d1", "r", "rm-a", rewards, None, None, 0.5, "bayesian", 0, False, True, extra)
