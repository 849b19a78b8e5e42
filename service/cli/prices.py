"""The option `--price NAME=P`: what a call of each RM costs. Called by `evaluate`, `replay`, `frontier`, `ope`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from router_core.combine import relative_prices

Price = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=P, once per RM: what one call costs, in any unit; the others cost 1. Budgets are in units of the "
        "cheapest.",
        show_default=False,
    ),
]


def parse_prices(given: Sequence[str] | None, names: Sequence[str]) -> NDArray[np.float64]:
    """Return the prices (K,) in units of the cheapest; an RM that is not named costs 1 before that."""
    prices = dict.fromkeys(names, 1.0)
    for part in given or ():
        name, _, value = part.rpartition("=")
        try:
            price = float(value)
        except ValueError:
            price = np.nan
        if name not in prices or not 0.0 < price < np.inf:
            raise typer.BadParameter(
                f"{part!r}: give NAME=PRICE with a positive price and one of {', '.join(names)}", param_hint="price"
            )
        prices[name] = price
    return relative_prices([prices[name] for name in names])


def cost_of(row: Mapping[str, Any]) -> str:
    """Return calls per instance as people read them, with the price behind it where that is another number."""
    calls, price = f"{row['calls_per_instance']:.3g}", f"{row['price_per_instance']:.3g}"
    return calls if calls == price else f"{calls} ({price})"
