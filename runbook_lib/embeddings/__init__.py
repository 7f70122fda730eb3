"""Where vectors come from, and what leaves for the model."""
