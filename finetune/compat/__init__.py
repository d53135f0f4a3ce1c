"""What we use of other packages beyond their public API, a module for each package: after an update, look here first."""
