"""From raw samples in every published spelling to conversations in one form."""
