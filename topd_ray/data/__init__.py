"""Where prompts come from, in which order they are drawn, and how trajectories travel as Arrow."""
