"""Scores of chains from their text and what is known about the question. No torch, no model."""
