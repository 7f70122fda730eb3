"""The command, and what it needs: asking for parameters, the demo, the documents that are made from code."""
