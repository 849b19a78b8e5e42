"""`reward_scale` and `reward_shift` of the pool file change every reward of an arm, and nothing else."""

from __future__ import annotations

import pytest

from service.errors import ConfigurationError
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.probe import probe
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from tests.service.scorers.worker_servers import ScriptedWorker, Serve, soon
from tests.support.arms import score_groups, score_items

PAIR = [("p", "a"), ("p", "bb")]


async def test_the_score_transform_is_applied_to_every_reward(serve: Serve) -> None:
    url = serve(ScriptedWorker())
    rendering = TemplateRendering(PlainTemplate())
    plain = VllmArm(ArmConfig(name="rm", urls=(url,), rendering=rendering))
    scaled = VllmArm(ArmConfig(name="rm", urls=(url,), rendering=rendering, reward_scale=-0.5, reward_shift=3.0))
    raw = list(await score_items(plain, PAIR, deadline=soon()))
    expected = [3.0 - 0.5 * reward for reward in raw]
    assert list(await score_items(scaled, PAIR, deadline=soon())) == expected
    (group,) = await score_groups(scaled, [PAIR], deadline=soon())
    assert group == expected
    # What the worker must show is about its own logits.
    assert (await probe(scaled, deadline=soon()))[0].raw == (await probe(plain, deadline=soon()))[0].raw
    await plain.close()
    await scaled.close()


@pytest.mark.parametrize(
    "options", [{"reward_scale": 0.0}, {"reward_scale": float("nan")}, {"reward_shift": float("inf")}]
)
def test_a_score_transform_that_loses_the_reward_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="reward_scale"):
        ArmConfig(name="rm", urls=("http://127.0.0.1:1",), **options)  # type: ignore[arg-type]
