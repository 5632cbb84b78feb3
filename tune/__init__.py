"""Searches over training runs with Ray Tune: spaces, proposals, trials, results."""
