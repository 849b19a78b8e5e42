"""HTTP in, use case, HTTP out: one thin file per endpoint group."""
