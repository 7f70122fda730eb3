"""The search function that the application calls, and its routes."""
