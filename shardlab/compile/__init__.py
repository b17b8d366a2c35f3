"""Stage 2 COMPILE: one file per target family (jax side of the wall)."""
