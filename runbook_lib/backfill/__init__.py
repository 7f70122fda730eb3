"""Batches, workers and throttling of the backfill, and where the vectors are kept."""
