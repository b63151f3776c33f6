"""Losses, schedule, loop and checkpoints of one phase."""
