"""The small library that notebooks call: connection, gates, ledger, steps, display."""
