"""What happens inside a patched MODEL."""
