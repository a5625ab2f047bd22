"""After training: what an adapter is worth."""
