"""Whatever puts parts together: the stages of a run, its launchers, Slurm, the quickstart."""
