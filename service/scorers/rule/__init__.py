"""Rules: functions that verify a response, in a worker of their own. The gateway never runs them."""
