"""Which values feedback may hold: scalars of other libraries, and what cannot be sent."""

from __future__ import annotations

import json
import pickle
import uuid
from fractions import Fraction
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from service.trainers.client import RouterClient
from service.trainers.values import Accepted, Declined, Feedback

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": float("nan")},
        {"reward": float("inf")},
        {"preferred": True},
        {"preferred": np.bool_(True)},
        {"preferred": "0"},
        {"preferred": 0.5},
        {"preferred": np.array([0, 1])},
        {"preferred": torch.tensor([0, 1])},
        {"loss": torch.tensor(float("nan"))},
        {"loss": 10**400},
        {"loss": object()},
        {"preferred": 0, "run": 7},
        {"preferred": 0, "decision_id": uuid.UUID(int=1)},
        {"preferred": 0, "decision_id": None},
        {"preferred": 0, "decision_id": None, "prompt": "p", "responses": ("x", None)},
    ],
)
def test_feedback_that_cannot_be_sent_costs_its_own_item_alone(fields: dict[str, Any]) -> None:
    item = Feedback(**{"decision_id": "bad", **fields})
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.extend(json.loads(request.content)["items"])
        results = [{"decision_id": one["decision_id"], "event_id": "1-0", "duplicate": False} for one in asked]
        return httpx.Response(200, json={"results": results})

    one, two = Feedback(decision_id="1", preferred=0), Feedback(decision_id="2", preferred=1)
    with RouterClient(transport=httpx.MockTransport(answer)) as client:
        first, bad, last = client.feedback_many([one, item, two])
        with pytest.raises(ValueError, match=r"feedback must be|give a string|give its text|names no decision"):
            client.feedback(item)
    assert [first, last] == [Accepted("1", "1-0", False), Accepted("2", "1-0", False)]
    assert isinstance(bad, Declined)
    assert bad.code == "validation"
    assert [one["decision_id"] for one in asked] == ["1", "2"]


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"preferred": np.argmax([0.1, 0.9])}, 1),
        ({"preferred": torch.tensor([0.1, 0.9]).argmax()}, 1),
        ({"preferred": np.uint8(1)}, 1),
        ({"preferred": np.float64(1.0)}, 1),
        ({"loss": np.float32(0.5)}, 0.5),
        ({"loss": torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True)}, 0.5),
        ({"reward": np.array(0.25)}, 0.25),
        ({"reward": Fraction(1, 4)}, 0.25),
    ],
)
def test_scalars_of_numpy_and_torch_are_numbers(fields: dict[str, Any], sent: float) -> None:
    item = Feedback(decision_id="d", **fields)
    [name] = fields
    assert json.dumps(item.document()[name]) == json.dumps(sent)
    assert type(getattr(item, name)) is type(sent)
    assert pickle.loads(pickle.dumps(item)) == item
