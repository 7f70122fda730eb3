"""The operations that a migrated table needs in the years after, a module each."""
