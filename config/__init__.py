"""Config files: one per data set, each with only what differs from the defaults."""
