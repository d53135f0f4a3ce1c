"""Several processes and machines: engines, ranks, and how processes are started."""
