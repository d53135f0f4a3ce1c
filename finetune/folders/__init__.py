"""What lies on disk: is it whole, and what is it."""
