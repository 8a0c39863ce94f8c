"""One runnable experiment each; every number of it is visible in its file."""
