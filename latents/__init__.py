"""Pure transforms of LATENTs and of decoded frames."""
