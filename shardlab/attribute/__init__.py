"""Stage 4 ATTRIBUTE: collectives, their executions, axes, phase, layer and source line."""
