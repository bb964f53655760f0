"""One file per published system: its loss, its phases, its way to answer."""
