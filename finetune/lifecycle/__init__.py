"""How a run begins, goes on, stops and ends, and the record that it keeps of that."""
