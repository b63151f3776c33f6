"""Text of chains alone: steps, claims, wording, numbers. No torch, no records."""
