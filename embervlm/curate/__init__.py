"""Records before training: convert, check, filter, augment, ask teachers. Starts without torch."""
