"""What a run is told: the schema of its YAML file, and how the file and the command line become one config."""
