"""How the backfill divides, paces and shares its work, and where the vectors stand."""
