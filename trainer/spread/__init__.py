"""How a run is spread over ranks: DDP, ZeRO, FSDP, shared sequences."""
