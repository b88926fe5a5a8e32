"""How a new policy reaches the rollout engines."""
