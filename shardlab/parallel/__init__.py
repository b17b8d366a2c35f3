"""How a plan is applied: rules to shardings (jax side of the wall)."""
