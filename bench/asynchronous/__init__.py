"""The asynchronous driver over engines that only sleep: what overlap gains, and what the driver itself costs."""
