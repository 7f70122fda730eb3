"""A run of notebooks: order, claims, signals, limits, sign-off, and the truth about how it ended."""
