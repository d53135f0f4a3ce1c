"""How much memory and time a run takes, and what makes it fit."""
