"""The records and the display of a run while it trains."""
