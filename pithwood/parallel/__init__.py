"""More than one process: the mesh, and everything that calls collectives. No other room does."""
