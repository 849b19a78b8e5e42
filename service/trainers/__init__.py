"""What RLHF trainers send and expect: wire formats for the gateway, and helpers inside a trainer. Imports nothing."""
