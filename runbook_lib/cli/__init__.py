"""The command, and what it needs: asking for parameters, the demo, generated documents."""
