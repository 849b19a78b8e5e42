"""The gateway: turns requests into calls on `router_core`, and remembers."""
