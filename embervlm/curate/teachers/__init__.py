"""Teachers that write chains for questions: endpoints, and the files of their answers."""
