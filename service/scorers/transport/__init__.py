"""Transport to servers of scorers and encoders: connections, replicas, circuit breakers, load."""
