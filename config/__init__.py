"""Config files, one per data set. Each holds only what differs from the defaults."""
