"""What was learned, in other libraries. Each module needs its own extra."""
