"""Held-out evaluation: the fixed protocol, its intervals, and the small grid on the same tasks."""
