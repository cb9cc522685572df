"""Held-out evaluation: the fixed protocol and its intervals, the small grid, and all rivals of a learner."""
