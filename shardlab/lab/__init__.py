"""Many cases: compile them in parallel, rank them."""
