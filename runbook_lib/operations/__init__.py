"""What a migrated table needs in the years after; an operation a module, its notebook in notebooks/operate/."""
