"""The experiments of the paper, with protocols that can be repeated."""
