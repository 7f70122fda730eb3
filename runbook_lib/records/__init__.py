"""What a run leaves for a reviewer, and how it is checked and compared."""
