"""Services of anybody that speak the scorer protocol (`service.scorers.http.wire`), and what asks them."""
