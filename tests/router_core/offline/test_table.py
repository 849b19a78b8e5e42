"""Table 2: which rows there are, that no pair is judged by what has seen it, gaps, several responses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import DatasetError, UnknownPolicyError
from router_core.offline.evaluate import (
    default_head,
    majority_correctness,
    route,
    uwo_correctness,
)
from router_core.offline.table import (
    Judged,
    Router,
    fits,
    fold_splits,
    held_out_split,
    judge_checkpoint,
    judge_fitted,
    routers,
)
from router_core.offline.train import TrainConfig, pair_features, train
from router_core.policies import ScoreScale
from router_core.prior import PriorForm
from router_core.records import Instance, LabelledPair, verdict_of
from tests.support.offline import POOL, two_domains

FAST = TrainConfig(max_epochs=8, folds=2, directions=4, hidden=8)
SURFACE = SurfaceBackbone()


def judge(train_pairs: list[LabelledPair], test_pairs: list[LabelledPair], rows: list[Router]) -> Judged:
    pairs = train_pairs + test_pairs
    splits = {0: [held_out_split(len(train_pairs), len(test_pairs))]}
    return judge_fitted(pairs, POOL, splits, rows, {"surface": SURFACE}, {"surface": pair_features(pairs, SURFACE)})


def scored(scores: dict[str, tuple[float, ...]], label: int = 0) -> LabelledPair:
    n = len(next(iter(scores.values())))
    verdicts = {name: verdict_of(row) for name, row in scores.items()}
    return LabelledPair("p", Instance("p", ("r",) * n), label, scores, verdicts)


def test_the_first_encoder_has_the_ablations_and_the_others_one_row_each() -> None:
    rows = routers(["static", "minilm"], FAST)
    assert [row.name for row in rows] == [
        "offline", "offline:bt", "offline:cls", "offline:no-cls", "offline@minilm",
    ]  # fmt: skip
    assert len(fits(rows)) == 3
    assert [row.name for row in routers(["static"], FAST, ablations=False)] == ["offline"]


def test_without_classification_loss_the_one_row_is_still_called_offline() -> None:
    config = replace(FAST, lambda_cls=0.0)
    assert routers(["static"], config) == [Router("offline", "static", config)]


def test_held_out_pairs_are_judged_by_routers_that_learned_which_model_is_right_where() -> None:
    config = replace(FAST, max_epochs=20)
    judged = judge(two_domains(200), two_domains(100, seed=1), routers(["surface"], config))
    means = {name: float(values.mean()) for name, values in judged.rows.items()}
    assert len(judged.table) == 100
    assert list(judged.rows)[:5] == ["single:coder", "single:talker", "random", "majority", "uwo"]
    assert means["random"] == pytest.approx((means["single:coder"] + means["single:talker"]) / 2)
    for name in ("offline", "offline:bt", "offline:cls", "offline:no-cls"):
        assert means[name] > max(means["single:coder"], means["single:talker"]) + 0.1
        np.testing.assert_allclose(judged.asked[name], [0.5, 0.5], atol=0.03)
    assert (judged.calls["uwo"], judged.calls["majority"], judged.calls["offline"]) == (2, 2, 1)


def test_the_table_is_what_train_and_route_give() -> None:
    train_pairs, test_pairs = two_domains(80), two_domains(40, seed=1)
    judged = judge(train_pairs, test_pairs, [Router("offline", "surface", FAST, "bt")])
    checkpoint = train(train_pairs, POOL, SURFACE, FAST)
    arms = route(checkpoint, checkpoint.fuse.apply(pair_features(test_pairs, SURFACE)), "bt")
    expected = [pair.correctness(POOL[arm]) for pair, arm in zip(test_pairs, arms, strict=True)]
    np.testing.assert_array_equal(judged.rows["offline"], [expected])


def test_cross_validation_judges_every_pair_once_per_seed_without_its_group() -> None:
    pairs = [replace(pair, group=str(i // 3)) for i, pair in enumerate(two_domains(90))]
    splits = {seed: fold_splits(pairs, 3, seed) for seed in (0, 1)}
    for parts in splits.values():
        assert sorted(np.concatenate([part.outside for part in parts]).tolist()) == list(range(90))
        for part in parts:
            assert not {pairs[i].group for i in part.inside} & {pairs[i].group for i in part.outside}
    done = 0

    def on_fit() -> None:
        nonlocal done
        done += 1

    rows = routers(["surface"], FAST, ablations=False)
    features = {"surface": pair_features(pairs, SURFACE)}
    judged = judge_fitted(pairs, POOL, splits, rows, {"surface": SURFACE}, features, on_fit)
    assert (judged.rows["offline"].shape, judged.rows["random"].shape, done) == ((2, 90), (1, 90), 6)
    assert judged.table.groups == tuple(pair.group for pair in pairs)
    assert not np.isnan(np.concatenate(list(judged.rows.values()))).any()


def test_pairs_with_gaps_are_learned_from_but_not_judged() -> None:
    train_pairs, test_pairs = two_domains(240, missing=0.3), two_domains(100, seed=1, missing=0.3)
    gaps = sum(len(pair.verdicts) < 2 for pair in test_pairs)
    judged = judge(train_pairs, test_pairs, routers(["surface"], replace(FAST, max_epochs=20), ablations=False))
    assert (judged.left_out, len(judged.table)) == (gaps, 100 - gaps)
    assert 15 < gaps < 45
    assert judged.rows["offline"].mean() > judged.table.correctness.mean(axis=0).max() + 0.1


def test_a_pool_that_no_judged_pair_knows_whole_is_refused_with_the_remedy() -> None:
    only = [replace(p, verdicts={"coder": 0}, scores={"coder": (1.0, 0.0)}) for p in two_domains(10, seed=1)]
    with pytest.raises(DatasetError, match="none of the 10 judged pairs"):
        judge(two_domains(40), only, routers(["surface"], FAST, ablations=False))


def test_a_pool_with_an_unknown_name_is_refused() -> None:
    pairs = two_domains(20)
    splits = {0: fold_splits(pairs, 2, 0)}
    with pytest.raises(DatasetError, match="'nobody'"):
        judge_fitted(pairs, ["coder", "nobody"], splits, [], {}, {})


def test_several_responses_train_and_are_judged() -> None:
    train_pairs, test_pairs = two_domains(240, n_responses=4), two_domains(100, seed=1, n_responses=4)
    judged = judge(train_pairs, test_pairs, routers(["surface"], replace(FAST, max_epochs=20), ablations=False))
    assert judged.rows["single:coder"].mean() == pytest.approx(0.6, abs=0.12)
    assert judged.rows["offline"].mean() > 0.9


def test_majority_of_several_responses_by_hand() -> None:
    votes = {"A": (0.0, 0.0, 1.0), "B": (0.0, 0.0, 2.0), "C": (1.0, 0.0, 0.0)}
    pairs = [scored(votes, label=2), scored(votes, label=0), scored({"A": (0.0, 0.0, 1.0), "B": (1.0, 0.0, 0.0)})]
    np.testing.assert_array_equal(majority_correctness(pairs, ("A", "B", "C")), [1, 0, 0.5])


def test_pairs_without_subset_stand_under_their_domain() -> None:
    test_pairs = two_domains(9, seed=1)
    test_pairs[0] = replace(test_pairs[0], subset="", domain="maths")
    test_pairs[1] = replace(test_pairs[1], subset="", domain="")
    judged = judge(two_domains(40), test_pairs, routers(["surface"], FAST, ablations=False))
    assert judged.table.subsets[:3] == ("maths", "(none)", "prose")


def test_uwo_by_hand() -> None:
    one = ScoreScale(np.zeros(2), np.ones(2))
    # u = mean − variance / 2: (2 − 2.25/2, 1) = (0.875, 1), so that the response on which they agree wins.
    careful = scored({"A": (3.5, 1.0), "B": (0.5, 1.0)})
    alone = scored({"B": (3.0, 1.0)})
    np.testing.assert_array_equal(uwo_correctness([careful, alone], ("A", "B"), one), [0, 1])
    np.testing.assert_array_equal(uwo_correctness([replace(careful, label=1)], ("A", "B"), one), [1])


def test_a_checkpoint_is_judged_as_it_is() -> None:
    train_pairs, test_pairs = two_domains(80), two_domains(40, seed=1)
    checkpoint = train(train_pairs, POOL, SURFACE, FAST)
    judged = judge_checkpoint(checkpoint, test_pairs, pair_features(test_pairs, SURFACE))
    fitted = judge(train_pairs, test_pairs, routers(["surface"], FAST))
    for name in ("offline", "offline:bt", "offline:cls", "majority", "single:coder"):
        np.testing.assert_array_equal(judged.rows[name], fitted.rows[name])


def test_the_default_head_is_the_one_that_the_prior_ranks_by() -> None:
    checkpoint = train(two_domains(40), POOL, SURFACE, FAST)
    assert default_head(checkpoint) == "cls"
    assert default_head(replace(checkpoint, prior_form=PriorForm.PAPER)) == "bt"
    assert default_head(replace(checkpoint, cls_weight=np.zeros_like(checkpoint.cls_weight))) == "bt"


def test_a_cascade_of_one_call_is_routing_and_more_calls_cost_what_they_may() -> None:
    pairs = two_domains(200)
    names = ("stacked", "cascade:1", "cascade:1.5")
    config = replace(FAST, max_epochs=20)
    splits = {0: [held_out_split(150, 50)]}
    judged = judge_fitted(
        pairs,
        POOL,
        splits,
        routers(["surface"], config, ablations=False),
        {"surface": SURFACE},
        {"surface": pair_features(pairs, SURFACE)},
        combined=names,
    )
    assert [name for name in judged.rows if name in names] == list(names)
    np.testing.assert_array_equal(judged.rows["cascade:1"], judged.rows["offline"])
    assert judged.calls["cascade:1"] == 1.0
    assert judged.calls["stacked"] == 2.0
    assert 1.0 <= judged.calls["cascade:1.5"] <= 1.75
    assert judged.rows["stacked"].mean() >= judged.rows["majority"].mean()


def test_only_the_policies_that_are_named_are_shown() -> None:
    judged = judge(two_domains(80), two_domains(40, seed=1), routers(["surface"], FAST, ablations=False))
    assert list(judged.only(("offline", "uwo")).rows) == ["uwo", "offline"]
    assert judged.only(()) is judged
    with pytest.raises(UnknownPolicyError, match=r"there is no row ..mine"):
        judged.only(("mine",))
