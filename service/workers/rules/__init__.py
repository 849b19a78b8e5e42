"""The rule worker: a function that scores one response, run in processes of its own with bounds on time and memory."""
