"""A job as its owner sees it: the run folder, its attempts and their history."""
