"""Runs and jobs as their owner sees them: status, logs, runs, diff."""
