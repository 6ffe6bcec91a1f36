"""Before a run starts: estimates of memory and time, and the dry run."""
