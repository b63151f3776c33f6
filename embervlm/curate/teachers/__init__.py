"""Who writes chains for questions: endpoints, and what keeps their answers."""
