"""How searches are measured: queries, exact answers, recall, relevance, plans."""
