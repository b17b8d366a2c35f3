"""The Flax NNX models and their step functions (jax side of the wall)."""
