"""After training: verify an adapter, chat with it, compare, merge, report, export."""
