"""Long-context tasks through a real server: what a policy costs in accuracy, and how much of the KV cache it reads."""
