"""SeqIO task and mixture registrations, and the almanac, a generated world."""
