"""Where decisions, the event log and snapshots live. `redis` is the only real store; `memory` is for unit tests."""
