"""The demo's images."""
