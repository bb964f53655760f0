"""One file per system: its loss and its way to answer. Training and answering know only the protocol."""
