"""The look before a run: what a data file holds, and what a run would do with it and take."""
