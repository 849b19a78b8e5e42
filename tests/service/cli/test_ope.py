"""The command `ope`: values of other policies from an exported log, through the real gateway and a real file."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import Fuse
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import UnknownPolicyError
from router_core.ope import LoggedData
from router_core.posterior import fold, start
from router_core.prior import Hyperparameters
from router_core.records import Instance
from service.cli import app
from service.cli.ope import _remarks
from service.errors import ConfigurationError
from service.lab.estimates import evaluate_log, judge, recommended
from service.lab.eventlog.export import export_log
from service.lab.eventlog.load import fold_events, load_log, logged_data
from service.lab.eventlog.targets import Targets, load_checkpoint
from service.scorers.protocol import AbstainedError
from service.stores.redis import RedisStore
from tests.support.arms import ScriptedArm
from tests.support.gateway import DIM, fresh_run, open_gateway, pair, small_encoder

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pytest.importorskip("pyarrow", reason="needs reward-router[export]")

POOL = ("rm-a", "rm-b", "rm-c")


def arms() -> list[ScriptedArm]:
    """rm-a likes the longer response, which is always the better one here; rm-b the shorter; rm-c depends."""
    mixed: Callable[[str, str], float] = lambda prompt, text: len(text) * (1.0 if len(prompt) % 2 else -1.0)  # noqa: E731
    return [
        ScriptedArm("rm-a"),
        ScriptedArm("rm-b", lambda _, response: -float(len(response))),
        ScriptedArm("rm-c", mixed),
    ]


def checkpoint(seed: int = 0) -> Checkpoint:
    """A checkpoint that knows that rm-a is good and rm-b bad."""
    rng = np.random.default_rng(seed)
    return Checkpoint(
        pool=POOL,
        encoder_spec="surface",
        fuse=Fuse.identity(SurfaceBackbone().dim, DIM),
        bt_embeddings=rng.standard_normal((3, DIM)).astype(np.float32),
        cls_weight=np.zeros((3, DIM), np.float32),
        cls_bias=np.array([2.0, -2.0, 0.0], np.float32),
        calibration_scale=np.ones(3, np.float32),
        calibration_shift=np.zeros(3, np.float32),
        hyperparameters=Hyperparameters(lambda0=30.0, sigma2=0.12, v=0.3),
    )


def make_log(url: str, out: Path, count: int, run: str | None = None, **settings: Any) -> None:
    """A file of so many events of a new run; its draws are the same each time where its name is."""

    async def make(run: str) -> None:
        async with open_gateway(url, **{"arms": arms(), "run": run, **settings}) as gateway:
            for index in range(count):
                reply = await gateway.client.ok("/reward", pair(index * 7))
                await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
            if count:
                await gateway.learned(count)
        store = RedisStore(url, window_seconds=60)
        try:
            await export_log(store, run, out)
        finally:
            await store.close()

    asyncio.run(make(run or fresh_run()))


def abstains(prompt: str) -> bool:
    """True of about half the prompts."""
    return zlib.crc32(prompt.encode()) % 2 == 0


class SilentAtTimes(ScriptedArm):
    """Is right wherever it answers."""

    async def score(self, instances: Sequence[Instance], **rest: Any) -> list[Any]:
        told = await super().score(instances, **rest)
        silent = [abstains(instance.prompt) for instance in instances]
        return [AbstainedError("not for me") if no else one for no, one in zip(silent, told, strict=True)]


def ope(*options: object) -> Result:
    return CliRunner().invoke(app, ["ope", *map(str, options)])


@pytest.fixture(scope="module")
def random_file(valkey_server: ValkeyProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 events of the policy `random`."""
    out = tmp_path_factory.mktemp("ope") / "random.parquet"
    make_log(valkey_server.url, out, 150, run="ope-random", policy="random")
    return out


def test_values_of_the_singles_from_a_random_log(random_file: Path) -> None:
    done = ope(random_file, "--policies", "singles,random,bayesian", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["n"] == 150
    data = logged_data(load_log(random_file))
    mixed = np.mean([len(pair(index * 7)["prompt"]) % 2 for index in range(150)])
    truth = {"single:rm-a": 1.0, "single:rm-b": 0.0, "single:rm-c": mixed, "random": (1 + mixed) / 3}
    for name, value in truth.items():
        row = figures["policies"][name]
        assert row["problem"] is None
        for how in ("ips", "snips", "dr"):
            assert row[how]["ci95"][0] - 0.02 <= value <= row[how]["ci95"][1] + 0.02, (name, how)
            assert row[how]["ess"] > 30
        assert row["safe95"][0] <= value <= row["safe95"][1]
        assert row["recommended"] == ("dr" if row["dr"]["ess"] >= 100 else "snips")
    assert figures["policies"]["random"]["dr"]["mean_weight"] == pytest.approx(1.0, abs=1e-6)
    assert figures["policies"]["random"]["ips"]["value"] == pytest.approx(data.reward.mean(), abs=1e-6)
    assert figures["logged"]["value"] == pytest.approx(data.reward.mean())
    learned = figures["policies"]["bayesian"]
    assert learned["dr"]["n"] == 75
    assert learned["dr"]["value"] > figures["logged"]["value"] + 0.2
    assert "evaluated on the rest" in " ".join(learned["warnings"])


def test_the_table_says_what_the_log_cannot_tell(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    make_log(valkey_server.url, tmp_path / "log.parquet", 12, policy="single:rm-a")
    done = ope(tmp_path / "log.parquet", "--policies", "singles", "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert "100.0% of what the target would have asked has a propensity below 0.001" in done.output
    assert "worth 12 rows" in done.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["policies"]["single:rm-b"]["ips"] is None
    assert "Log with a policy that explores" in figures["policies"]["single:rm-b"]["problem"]
    assert figures["policies"]["single:rm-b"]["safe95"] == pytest.approx([0, 1])
    assert figures["policies"]["single:rm-a"]["ips"]["value"] == 1.0


def test_offline_and_softmax_need_the_checkpoint_of_the_run(
    valkey_server: ValkeyProcess, random_file: Path, tmp_path: Path
) -> None:
    checkpoint().save(tmp_path / "own")
    checkpoint(seed=1).save(tmp_path / "other")
    out = tmp_path / "log.jsonl"
    make_log(valkey_server.url, out, 60, policy="random", checkpoint=tmp_path / "own", encoder=small_encoder())
    names = "offline,softmax:0.05,bayesian,bayesian:none"
    done = ope(out, "--policies", names, "--checkpoint", tmp_path / "own", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)["policies"]
    # The offline stage asks rm-a everywhere, which is always right.
    assert figures["offline"]["snips"]["value"] == 1.0
    assert figures["softmax:0.05"]["snips"]["value"] > 0.9
    assert figures["bayesian"]["snips"]["value"] > 0.8
    wrong = ope(out, "--policies", "offline", "--checkpoint", tmp_path / "other")
    assert isinstance(wrong.exception, ConfigurationError)
    assert "is not the one that run" in str(wrong.exception)
    for file, policy in ((out, "offline"), (out, "bayesian"), (random_file, "softmax:1")):
        without = ope(file, "--policies", policy)
        assert isinstance(without.exception, ConfigurationError)
        assert "give --checkpoint" in str(without.exception)


def test_a_learned_policy_is_the_fold_of_the_first_part(random_file: Path) -> None:
    log = load_log(random_file)
    data = logged_data(log)
    first, pi = Targets(log, None, 0.4).probabilities("bayesian", data)
    assert first == 60
    assert pi.shape == (90, 3)
    from router_core.ope import fixed_policy
    from router_core.policies import BayesianPolicy
    from router_core.prior import no_prior

    posterior = fold(start(no_prior(3, DIM)), fold_events(log, slice(60)))
    assert pi == pytest.approx(fixed_policy(BayesianPolicy(), data.x[60:], data.available[60:], posterior), abs=1e-6)


@pytest.mark.parametrize("name", ["majority", "uwo", "laser", "softmax:warm", "single:nobody", "best"])
def test_policies_that_a_log_cannot_judge_are_refused(random_file: Path, name: str) -> None:
    done = ope(random_file, "--policies", name)
    assert isinstance(done.exception, UnknownPolicyError)


def test_a_scorer_that_abstains_has_its_own_figure(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    pool = [SilentAtTimes("rm-a"), *arms()[1:]]
    make_log(valkey_server.url, tmp_path / "log.jsonl", 100, run="ope-silent", policy="random", arms=pool)
    row = evaluate_log(load_log(tmp_path / "log.jsonl"), ["single:rm-a"], None)["policies"]["single:rm-a"]
    assert row["snips"]["value"] == 1.0
    assert (row["recommended"], row["ips"], row["dr"]) == ("snips", None, None)
    applies = np.mean([not abstains(pair(index * 7)["prompt"]) for index in range(100)])
    assert row["coverage"] == pytest.approx(applies, abs=0.25)
    assert "abstains on the others" in row["why"]


def test_the_narrow_table_has_the_values(random_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = ope(random_file, "--policies", "single:rm-a").stdout.splitlines()
    (logged,) = [line for line in lines if "as logged" in line]
    assert f"{logged_data(load_log(random_file)).reward.mean():.3f} (" in logged
    assert all(len(line) <= 80 for line in lines if line.startswith(("│", "┃")))


def test_a_checkpoint_for_a_run_without_one_is_refused(random_file: Path, tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "own")
    done = ope(random_file, "--policies", "offline", "--checkpoint", tmp_path / "own")
    assert "was served without a checkpoint" in str(done.exception)


def test_a_log_without_rewards_is_said(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    make_log(valkey_server.url, tmp_path / "empty.parquet", 0)
    with pytest.raises(ConfigurationError, match="has 0 events and none with a reward of one asked RM"):
        evaluate_log(load_log(tmp_path / "empty.parquet"), ["random"], None)


def test_clipping_is_reported(random_file: Path) -> None:
    figures = evaluate_log(load_log(random_file), ["single:rm-a"], None, clip=2.0)
    row = figures["policies"]["single:rm-a"]
    assert row["ips"]["max_weight"] == 2.0
    assert 0.2 < row["ips"]["clipped"] < 0.5
    assert any("clipped at 2" in warning for warning in row["warnings"])


def test_weights_that_are_off_are_warned_of_and_snips_is_recommended() -> None:
    n = 400
    propensities = np.tile([0.5, 0.5], (n, 1))
    first = np.arange(n) % 3 == 0
    data = LoggedData(
        ("a", "b"),
        np.zeros((n, 1), np.float32),
        np.where(first, 0, 1),
        propensities,
        np.ones((n, 2), bool),
        np.where(np.stack([first, ~first], axis=1), 1.0, np.nan),
    )
    verdict = judge(data, np.tile([1.0, 0.0], (n, 1)), np.full((n, 2), 0.5), None)
    assert verdict.estimates["ips"].mean_weight == pytest.approx(2 * first.mean())
    assert "mean weight 0.67 where 1 is expected" in verdict.warnings[0]
    assert recommended(verdict.estimates["snips"])[0] == "snips"


def test_a_remark_on_several_policies_is_made_once() -> None:
    row = {"recommended": None, "why": None, "problem": None, "warnings": ["beware"]}
    assert _remarks({"a": row, "b": row, "c": {**row, "warnings": []}}) == ["a, b: beware"]
    assert _remarks({"a": row, "b": row}) == ["every policy: beware"]


def test_a_checkpoint_that_misses_a_scorer_of_the_run_is_taken(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    checkpoint().select_pool(POOL[:2]).save(tmp_path / "two")
    out = tmp_path / "log.jsonl"
    make_log(valkey_server.url, out, 40, policy="random", checkpoint=tmp_path / "two", encoder=small_encoder())
    done = ope(out, "--policies", "offline,single:rm-c", "--checkpoint", tmp_path / "two", "--json", "-")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["policies"]["offline"]["snips"]["value"] == 1.0
    checkpoint(seed=1).select_pool(POOL[:2]).save(tmp_path / "other")
    with pytest.raises(ConfigurationError, match=r"\(it knows nothing of rm-c\)"):
        load_checkpoint(tmp_path / "other", load_log(out).header)
