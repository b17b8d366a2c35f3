"""Stage 5 COST: wire bytes, traffic per tier, communication time, FLOPs, memory."""
