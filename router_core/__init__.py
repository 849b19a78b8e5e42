"""The routing mathematics: posteriors, draws, propensities, policies, encoders and the offline stage.

Turns numbers into numbers and can be read with the paper ("Reward Model Routing in Alignment", arXiv 2510.02850) beside
it. Knows no network, clock, environment variable, web framework or store; time, ids and randomness arrive as arguments.
"""
