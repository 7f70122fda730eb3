"""A run of notebooks and its record: order, signals, limits, verification, comparison."""
