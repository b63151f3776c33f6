"""Figures and pages from the JSON that runs and evaluations leave. No torch, no model."""
