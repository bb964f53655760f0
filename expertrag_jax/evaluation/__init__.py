"""What was answered, at what cost, and whether the gate chose well: pure numpy, and the report made of it."""
