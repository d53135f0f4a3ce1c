"""From a file of conversations to token ids and labels."""
