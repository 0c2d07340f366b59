"""Examples that are part of the package."""
