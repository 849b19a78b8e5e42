"""What the gateway does, free of HTTP and of Redis: score, learn, and the runs they work on. Testable with fakes."""
