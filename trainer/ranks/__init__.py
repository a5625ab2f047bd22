"""A rank among the others: the screen, stopping, faults, what ranks check together."""
