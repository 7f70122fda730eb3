"""The phases of a migration, a module each, and what is checked before them."""
