"""What lies on disk: is it whole, what is it, and how it is written."""
