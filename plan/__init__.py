"""What a run will need, told before it starts: memory, time, traffic, disk. No torch, no weights, no GPU."""
