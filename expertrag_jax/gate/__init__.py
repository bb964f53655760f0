"""When to retrieve: the network, its objectives, its calibration, and the policies beside it."""
