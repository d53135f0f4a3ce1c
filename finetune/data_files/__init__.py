"""From a path to raw samples: the kinds of files that hold them."""
