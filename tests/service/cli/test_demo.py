"""What the demo says of a domain that got worse, and of kinds of scorers."""

from __future__ import annotations

from service.cli.demo import Asked, DemoResult, explain_worse, kind_shares


def asked(domain: str, right: int, n: int = 100) -> list[Asked]:
    """So many pairs of a domain, the first `right` of which are right."""
    return [Asked(domain, "rm-a", float(i < right), {}) for i in range(n)]


def test_only_domains_that_got_worse_are_explained() -> None:
    before = asked("code", 60) + asked("format", 90) + asked("safety", 90)
    after = asked("code", 80) + asked("format", 88) + asked("safety", 60)
    noise, lost = explain_worse(DemoResult(before, [], after, {}, 0, {}))
    assert noise.startswith("format: 0.02 fewer right than before the stream: within the noise of 100 pairs")
    assert lost.startswith("safety: 0.30 fewer right than before the stream: more than noise")


def test_shares_of_kinds_add_up_those_of_scorers() -> None:
    models = ["rm-a", "rm-b", "judge", "judge", "rule"]
    part = [Asked("code", model, 1.0, {}) for model in models]
    kinds = {"rm-a": "rm", "rm-b": "rm", "judge": "judge", "rule": "rule"}
    assert kind_shares(part, kinds) == {"code": [0.4, 0.4, 0.2]}
