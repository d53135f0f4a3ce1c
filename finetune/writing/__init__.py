"""Files that are whole or not there: written beside their place, brought onto the disk, signed, renamed, by one run at a time."""
